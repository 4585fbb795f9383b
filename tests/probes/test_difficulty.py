"""The difficulty of a training task, against the model's own loss on the same examples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megaarch.cli.main import main
from megaarch.probes import difficulty
from megaarch.probes.catalogue import Options
from megaarch.probes.probed_model import Subject, open_subject
from tests.conftest import PRESETS


@pytest.fixture(scope="module")
def subject(runs):
    return lambda preset: open_subject(Path(runs(preset)))


def losses(subject: Subject, converted) -> np.ndarray:
    """The loss of each weighted target, one row at a time, from the model's own forward pass."""
    found = []
    for one in converted:
        batch = subject.packed([one])
        with torch.no_grad():
            nll = subject.model(batch).nll
        found.append(nll[batch.target_weights > 0].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("preset", PRESETS)
def test_nats_are_the_models_own_loss(subject, preset):
    """Also in a batch, where rows are padded to the longest."""
    of = subject(preset)
    rows = of.rows(24, 10)
    found = difficulty.of_task(of, rows, seed=3)
    expected = losses(of, difficulty.examples(of, rows.tokens, 3))
    assert found.nats_per_target is not None and found.entropy_per_target is not None
    assert found.nats_per_target.value == pytest.approx(expected.mean(), abs=1e-9)
    assert found.nats_per_target.items == len(expected)
    assert 0 < found.entropy_per_target.value <= np.log(512)
    sizes = [e.items for e in found.by_visible.values()]
    assert sum(sizes) >= len(expected)  # rows cut shorter add theirs


def test_targets_are_grouped_by_what_they_see(subject):
    """A causal decoder's target k sees k tokens, so that rows of 24 tokens fall into six ranges."""
    of = subject("gpt")
    found = difficulty.of_task(of, of.rows(24, 10), seed=0)
    rows = 10
    counts = {"1": 1, "2": 1, "3-4": 2, "5-8": 4, "9-16": 8, "17-32": 8}
    shorter = {"1": 3, "2": 3, "3-4": 1 + 2 + 2, "5-8": 2 + 4, "9-16": 4}  # of 3, 6 and 12 tokens
    expected = {name: rows * (n + shorter.get(name, 0)) for name, n in counts.items()}
    assert {name: e.items for name, e in found.by_visible.items()} == expected
    assert found.targets_per_token is not None
    assert found.targets_per_token.value == pytest.approx(1.0)


@pytest.mark.parametrize(("visible", "name"), [(1, "1"), (2, "2"), (3, "3-4"), (64, "33-64")])
def test_names_of_ranges(visible, name):
    assert difficulty.bucket(visible) == name


def test_the_command_probes_tasks_and_merges_nothing_of_one_run(runs, tmp_path, capsys):
    task = tmp_path / "kind.task.yaml"
    items = [
        {"text": f"number {i % 2}", "answer": "even" if i % 2 == 0 else "odd"} for i in range(40)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task.write_text(
        "summary: Even or odd?\ndata: {train: items.jsonl, test: items.jsonl}\nwordings:\n"
        '  - {name: plain, prompt: "{{ text }} is ||| {{ answer }}", choices: "even ||| odd"}\n'
    )
    run = runs("t5")
    arguments = ["probe", "difficulty", run, "--rows", "4", "--length", "16", "--json"]
    assert main([*arguments, "--tasks", str(task)]) == 0
    found = json.loads(capsys.readouterr().out)
    [record] = found["cells"].values()
    assert record["representation"]["kind"]["chance"] == 0.5
    assert record["linear"]["items"] == 10
    assert record["nats_per_target"]["seeds"] == []


def test_options_are_passed_on(subject):
    of = subject("gpt")
    assert Options().length_of(of) == 36  # three quarters of 48
    assert Options(length=8).length_of(of) == 8
