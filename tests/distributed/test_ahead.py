"""Steps launched before the figures of the one before, on several ranks: these act alike."""

import json
import os
import signal

import pytest
import torch
from torch import distributed

from megaarch.training.preemption import Stopped
from tests.distributed import runs
from tests.distributed.layouts import TWO_RANKS


def both_ways(raw, preset, given, directory):
    """Final weights and totals of a run whose steps are read at once, and launched ahead; with saves
    in the background."""
    found = []
    for ahead in (0, 1):
        mine = {"logging.directory": f"{directory}/{ahead}", "training.async_save": True}
        settings = runs.settings_of(raw, preset, given | mine | {"training.save_every": 2})
        trainer = runs.trainer_of(settings)
        trainer.ahead = ahead
        totals = {k: v for k, v in vars(trainer.run()).items() if k != "seconds"}
        found.append((runs.weights(trainer), totals))
    return found


@pytest.mark.parametrize("preset, layout", [("gpt", "fsdp2"), ("t5", "pp2"), ("xlnet", "tp2")])
def test_a_run_is_the_same(preset, layout, pool, raw, prepared, tmp_path):
    for plain, mine in pool.run(2, both_ways, raw, preset, TWO_RANKS[layout], tmp_path):
        assert plain[1] == mine[1] and plain[0].keys() == mine[0].keys()
        for name, value in plain[0].items():
            assert torch.equal(value, mine[0][name]), name
    lines = []
    for folder in (tmp_path / "0", tmp_path / "1"):
        written = (folder / "metrics.jsonl").read_text().splitlines()
        lines.append([(x["step"], x["loss"], x["flops"]) for x in map(json.loads, written)])
        checkpoints = {p.name for p in (folder / "checkpoints").iterdir()}
        assert {"latest", "step-00000004", "step-00000005"} <= checkpoints
        assert not [name for name in checkpoints if name.endswith(".writing")]
    assert lines[0] == lines[1] and len(lines[0]) == 5


def signalled(raw, given):
    """Rank 1 alone hears a signal, as it has read its first step."""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    trainer.ahead = 1

    def watch(step):
        if distributed.get_rank() == 1 and step.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.watch = watch
    try:
        trainer.run()
    except Stopped as stopped:
        return stopped.number, stopped.step, trainer.progress.step


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_a_signal_that_one_rank_hears_stops_all_at_the_same_step(
    layout, pool, raw, prepared, tmp_path
):
    given = TWO_RANKS[layout] | {"logging.directory": str(tmp_path / "run")}
    told = pool.run(2, signalled, raw, given)
    # the first step is read with the second launched, and what ranks say is acted on a step later
    assert told == [(signal.SIGTERM, 3, 3)] * 2
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
