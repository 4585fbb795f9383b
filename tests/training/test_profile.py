"""Traces by torch's profiler: of which steps, of which ranks, and that they change nothing of the run."""

import gzip
import json
import signal

import pytest
import torch

from megaarch.config import ConfigError
from megaarch.training.preemption import Stopped
from megaarch.training.trainer import Trainer


def updates(path):
    """How often the optimizer stepped in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum("Optimizer.step#" in event.get("name", "") for event in events)


def traces(folder):
    return {path.name: updates(path) for path in sorted((folder / "profile").glob("*"))}


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"profile_from": 3, "profile_steps": 2}, {"steps-3-4.rank-0.json.gz": 2}),
        ({"profile_from": 1, "profile_steps": 1}, {"steps-1-1.rank-0.json.gz": 1}),
        ({"profile_from": 5, "profile_steps": 9}, {"steps-5-6.rank-0.json.gz": 2}),
        ({"profile_from": 7}, {}),
        ({}, {}),
    ],
    ids=["amid", "the first", "beyond the end", "behind the end", "none"],
)
def test_a_trace_holds_the_steps_that_are_named(given, wanted, tiny, prepared, tmp_path):
    settings = tiny(**{f"logging__{name}": value for name, value in given.items()})
    Trainer(settings, prepared).run()
    assert traces(tmp_path / "run") == wanted


def test_a_traced_run_computes_what_another_does(tiny, prepared, tmp_path):
    plain = Trainer(tiny(logging__directory=str(tmp_path / "plain")), prepared)
    plain.run()
    trainer = Trainer(tiny(logging__profile_from=2), prepared)
    trainer.run()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_a_continued_run_traces_what_is_left(tiny, prepared, tmp_path):
    settings = tiny(logging__profile_from=2, logging__profile_steps=4)

    def stop(step):
        if step.progress.step == 3:
            signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(Stopped):
        Trainer(settings, prepared, watch=stop).run()
    Trainer(settings, prepared).run()
    assert traces(tmp_path / "run") == {
        "steps-2-3.rank-0.json.gz": 2,
        "steps-4-5.rank-0.json.gz": 2,
    }


def test_other_ranks_write_none_and_a_rank_that_is_absent_is_named(tiny, prepared, tmp_path):
    with pytest.raises(ConfigError, match="profile_ranks: there is no rank 1: the last one is 0"):
        Trainer(tiny(logging__profile_from=2, logging__profile_ranks=[0, 1]), prepared)
    Trainer(tiny(logging__profile_from=2, logging__profile_ranks=[]), prepared).run()
    assert not (tmp_path / "run" / "profile").exists()
