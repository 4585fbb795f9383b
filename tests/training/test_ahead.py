"""Steps that are launched before the figures of the one before, as on a GPU: what a run writes,
saves and ends with is what it is without."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaarch.training import trainer as trainer_module
from megaarch.training.preemption import Stopped
from megaarch.training.steps_in_flight import Readback
from megaarch.training.trainer import Trainer
from tests.steps import forward_backward

pytestmark = pytest.mark.slow

TIMED = ("tokens_per_second", "seconds")


@pytest.fixture
def ahead(monkeypatch):
    """Steps on a CPU are launched ahead from here on."""

    def on(steps=1):
        monkeypatch.setattr(trainer_module, "AHEAD", {"cpu": steps})

    return on


def lines(folder):
    """What metrics hold, but the times."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in found]


def poison(trainer, steps):
    """The gradients of these steps (from 1) are not finite."""
    honest = trainer.engine.forward_backward

    def poisoned(*given):
        loss = honest(*given)
        if trainer.launched.step + 1 in steps:
            next(trainer.model.parameters()).grad.fill_(float("nan"))
        return loss

    trainer.engine.forward_backward = poisoned


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_a_run_is_the_same(optimizer, ahead, tiny, prepared, tmp_path):
    """With a skipped step, saves and evaluations in its midst."""
    found = []
    for folder in ("at once", "ahead"):
        given = {"training__optimizer": optimizer, "training__save_every": 4}
        settings = tiny(logging__directory=str(tmp_path / folder), model__dropout=0.1, **given)
        seen = []

        def hold_out(engine, progress, seen=seen):
            weights = [p.detach().double().sum() for p in engine.model.parameters()]
            seen.append((progress.step, progress.skipped, float(sum(weights))))

        trainer = Trainer(settings, prepared, hold_out=hold_out, shares=(0.0, 0.5, 1.0))
        poison(trainer, {3})
        progress = trainer.run()
        kept = sorted(p.name for p in (tmp_path / folder / "checkpoints").iterdir())
        totals = {k: v for k, v in vars(progress).items() if k != "seconds"}
        found.append((trainer.model.state_dict(), seen, lines(tmp_path / folder), kept, totals))
        ahead()
    (plain, *others), (mine, *mine_too) = found
    assert mine_too == others
    assert [seen[:2] for seen in others[0]] == [(0, 0), (3, 1), (6, 1)]
    assert others[1][2]["gradient_norm"] is None and others[3]["skipped"] == 1
    for name, value in plain.items():
        assert torch.equal(value, mine[name]), name


def test_a_step_is_read_once_the_next_one_is_launched(ahead, tiny, prepared, monkeypatch):
    ahead()
    trainer, events = Trainer(tiny(training__save_every=3), prepared), []
    launch, read, save = trainer.train_step, Readback.read, trainer.saver.save
    trainer.train_step = lambda *given: events.append("launch") or launch(*given)
    trainer.saver.save = lambda *given: events.append("save") or save(*given)
    monkeypatch.setattr(Readback, "read", lambda self: events.append("read") or read(self))
    trainer.run()
    half = ["launch", "launch", "read", "launch", "read", "read", "save"]
    assert events == 2 * half  # six steps; all of them read before a save


def test_no_checkpoint_holds_what_the_guard_has_not_seen(ahead, tiny, prepared, tmp_path):
    ahead()
    trainer = Trainer(tiny(training__save_every=2, training__skip_limit=1), prepared)
    poison(trainer, {3, 4})
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 4"):
        trainer.run()
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"latest", "step-00000002"}
    skipped = json.loads((tmp_path / "run" / "nonfinite.json").read_text())["skipped"]
    assert [one["step"] for one in skipped] == [3, 4]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_a_signal_finishes_the_step_that_is_launched(ahead, tiny, prepared, tmp_path):
    whole = Trainer(tiny(logging__directory=str(tmp_path / "whole")), prepared)
    whole.run()
    ahead()
    stopped = Trainer(tiny(), prepared)
    stopped.watch = lambda step: step.progress.step == 2 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="saved at step 3"):  # it was launched as the signal came
        stopped.run()
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    again = Trainer(tiny(), prepared)
    assert again.progress.step == 3
    again.run()
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


class Device:
    """A clock, and a device that takes five seconds a step, one step after the other."""

    def __init__(self):
        self.now, self.done = 0.0, [0.0]

    def perf_counter(self):
        return self.now

    def launch(self):
        self.done.append(max(self.now, self.done[-1]) + 5.0)

    def wait(self, step):
        self.now = max(self.now, self.done[step])

    def pass_by(self, seconds):
        self.now += seconds


def test_seconds_are_those_of_the_steps(ahead, tiny, prepared, monkeypatch, tmp_path):
    """And of nothing between them, though a step begins before the one before it has ended."""
    device = Device()
    monkeypatch.setattr(trainer_module, "time", device)
    ahead()
    trainer = Trainer(tiny(), prepared, hold_out=lambda *_: device.pass_by(100), shares=(0, 0.5))
    learn, read = trainer.engine.forward_backward, Readback.read
    trainer.engine.forward_backward = lambda *given: device.launch() or learn(*given)
    steps = iter(range(1, 7))
    monkeypatch.setattr(Readback, "read", lambda self: device.wait(next(steps)) or read(self))
    assert trainer.run().seconds == 6 * 5
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        assert found["tokens_per_second"] == found["seen_tokens"] / found["step"] / 5


class Reads(TorchDispatchMode):
    """Counts what is read from tensors: each time a GPU's host would wait."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator._schema.name in ("aten::_local_scalar_dense", "aten::equal")
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer, reads", [("adamw", 0), ("sgd", 1)])
def test_the_device_decides_whether_a_step_is_taken(optimizer, reads, tiny, prepared):
    """Where the optimizer can leave it to the device; else the host reads it, once."""
    trainer = Trainer(tiny(training__optimizer=optimizer), prepared)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    for broken in (True, False):
        loss = forward_backward(trainer, trainer.steps[0])
        if broken:
            next(trainer.model.parameters()).grad[0] = float("inf")
        with Reads() as mode:
            _, finite = trainer.engine.update(trainer.optimizer, loss)
        assert mode.count == reads
        same = map(torch.equal, weights, trainer.model.parameters())
        assert bool(finite) == (not broken) and all(same) == broken
        assert all(p.grad is None for p in trainer.model.parameters())
