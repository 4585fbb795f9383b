"""Bad command lines, from a fixed seed: one sentence or a result, no traceback, no hang, nothing written
but what was asked for. A longer run: `python -m tests.fuzz.run --inputs 2000`."""

import random

import pytest
import torch

from tests.fuzz import flags, sound

torch.set_num_threads(1)
LONG = "model.sequence_length=16777216"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sound.make(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", flags.COMMANDS)
def test_a_bad_command_line_is_told_in_a_sentence(name, files, tmp_path):
    for seed in range(4):
        outcome, _, given = flags.tried(flags.COMMANDS[name], files, tmp_path / "case", seed)
        assert outcome in ("accepted", "told"), f"seed {seed}: {given}: {outcome}"


@pytest.mark.parametrize(
    "given",
    [
        *(
            ("describe", "run.yaml", "--set", f"model.{setting}")
            for setting in (
                *("layers=1e20", "layers=1024", "sequence_length=16777216", "hidden_size=1048576"),
                *("sequence_length=1000000", "segments=9223372036854775808", "target_length=1e300"),
            )
        ),
        ("plan", "run.yaml", "--gpus", "1000000000", "--set", "training.precision=bf16"),
        ("plan", "run.yaml", "--gpus", "8", "--set", "training.precision=bf16", LONG),
        ("dry-run", "run.yaml", "--set", "training.precision=bf16", "model.hidden_size=1048576"),
        ("train", "run.yaml", "--set", "training.micro_batch_size=1000000000"),
        ("train", "run.yaml", "--set", "model.hidden_size=1048576"),
        ("train", "run.yaml", "--set", "data.workers=100000"),
        ("evaluate", "run", "--set", "model.hidden_size=1048576"),
    ],
    ids=lambda given: " ".join(given),
)
def test_huge_numbers_are_told_or_counted_soon(given, files, tmp_path):
    command = flags.COMMANDS[f"megaarch {given[0]}"]
    outcome, _ = flags.outcome_of(command, list(given), files, tmp_path / "case")
    assert outcome in ("accepted", "told"), outcome


def test_every_flag_and_command_is_tried():
    """The command lines of some seeds hold each flag of each command."""
    for name, command in flags.COMMANDS.items():
        wanted = {
            action.option_strings[0]
            for action in command.parser._actions
            if action.option_strings and action.dest not in ("help", "debug")
        }
        words = [
            word for seed in range(600) for word in flags.command_line(command, random.Random(seed))
        ]
        for flag in wanted:
            assert any(word.partition("=")[0] == flag for word in words), f"{name} {flag}"
