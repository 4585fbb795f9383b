"""Saving in the background changes nothing but when; which checkpoints stay; a save that fails."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from megaarch.checkpoint import checkpoint, manifest, retention, storage
from megaarch.config import ConfigError
from megaarch.training.preemption import Stopped
from megaarch.training.trainer import Trainer

pytestmark = pytest.mark.slow


def names(folder):
    return sorted(p.name for p in (Path(folder) / "checkpoints").iterdir())


def step(number):
    return f"step-{number:08d}"


@pytest.mark.parametrize("given", [{"training__async_save": True}, {}])
def test_every_so_many_steps_one_stays_for_good(given, tiny, prepared, tmp_path):
    given |= {"training__save_every": 1, "training__keep_checkpoints": 2, "training__keep_every": 3}
    Trainer(tiny(training__steps=8, **given), prepared).run()
    assert names(tmp_path / "run") == ["latest", step(3), step(6), step(7), step(8)]


def test_more_may_stay_than_there_are(tiny, prepared, tmp_path):
    Trainer(tiny(training__save_every=1, training__keep_checkpoints=5), prepared).run()
    assert names(tmp_path / "run") == ["latest", *(step(n) for n in range(2, 7))]


def test_steps_that_are_never_saved_cannot_stay(tiny):
    with pytest.raises(ConfigError, match="100 is no multiple of save_every 30"):
        tiny(training__save_every=30, training__keep_every=100)
    with pytest.raises(ConfigError, match="keep_every"):
        tiny(training__keep_every=100)


def test_what_a_killed_save_or_removal_left_is_swept_away(tiny, prepared, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for rest in (f"{step(1)}{retention.ASIDE}", f"{step(2)}{retention.LEAVING}"):
        (folder / rest / "state").mkdir(parents=True)
    Trainer(tiny(), prepared).run()
    assert names(tmp_path / "run") == ["latest", step(6)]


@pytest.fixture
def held(monkeypatch):
    """Holds every background save back, after its state was copied, until it is set."""
    gate, seal = threading.Event(), manifest.seal

    def patient(aside, grid):
        assert gate.wait(60)
        return seal(aside, grid)

    monkeypatch.setattr(manifest, "seal", patient)
    yield gate
    gate.set()


def test_training_goes_on_meanwhile_and_the_checkpoint_is_of_its_own_step(
    held, tiny, prepared, tmp_path
):
    plain = Trainer(tiny(logging__directory=str(tmp_path / "plain")), prepared)
    weights = []
    plain.watch = lambda done: weights.append(
        {n: p.detach().clone() for n, p in plain.model.named_parameters()}
    )
    held.set()
    plain.run()
    held.clear()
    seen = []

    def watch(done):
        seen.append((done.progress.step, names(tmp_path / "run") if done.progress.step > 2 else []))
        if done.progress.step == 4:
            held.set()

    settings = tiny(training__async_save=True, training__save_every=2, training__keep_checkpoints=0)
    Trainer(settings, prepared, watch=watch).run()
    assert dict(seen)[3] == dict(seen)[4] == [f"{step(2)}.writing"]
    assert names(tmp_path / "run") == ["latest", step(2), step(4), step(6)]
    again = Trainer(tiny(logging__directory=str(tmp_path / "again")), prepared)
    checkpoint.load(tmp_path / "run" / "checkpoints" / step(2), again.engine, again.optimizer)
    for name, value in again.model.named_parameters():
        assert torch.equal(value, weights[1][name]), name


def test_a_signal_waits_for_what_is_being_written(held, tiny, prepared, tmp_path):
    settings = tiny(training__async_save=True, training__save_every=2, training__keep_checkpoints=0)
    trainer = Trainer(settings, prepared)

    def watch(done):
        if done.progress.step == 3:
            threading.Timer(0.5, held.set).start()
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.watch = watch
    with pytest.raises(Stopped, match="saved at step 3"):
        trainer.run()
    assert names(tmp_path / "run") == ["latest", step(2), step(3)]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_write_that_fails_is_one_sentence_and_the_one_before_stays(
    async_save, monkeypatch, tiny, prepared, tmp_path
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def watch(done):
        if done.progress.step == 3:  # from here on the disk is full
            trainer.saver.finish()
            monkeypatch.setattr(storage.Writer, "write_data", full)

    settings = tiny(training__async_save=async_save, training__save_every=2)
    trainer = Trainer(settings, prepared, watch=watch)
    with pytest.raises(
        OSError, match=r"step-00000004 could not be written: rank 0: OSError.*space"
    ):
        trainer.run()
    assert checkpoint.newest(tmp_path / "run").name == step(2)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == step(2)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_save_before_the_first_step_that_counts_changes_nothing(
    optimizer, tiny, prepared, tmp_path
):
    """An optimizer without state is then given one by torch."""
    found = []
    for every, stops in ((0, (4,)), (1, (4,)), (1, (1, 4))):
        for steps in stops:
            trainer = Trainer(
                tiny(
                    training__optimizer=optimizer,
                    training__save_every=every,
                    training__schedule="constant",
                    training__warmup=0.0,
                    training__steps=steps,
                    logging__directory=str(tmp_path / f"{every}-{len(stops)}"),
                ),
                prepared,
            )
            poison_first_step(trainer)
            trainer.run()
        assert trainer.progress.skipped == 1
        found.append([p.detach() for p in trainer.model.parameters()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def poison_first_step(trainer):
    honest = trainer.engine.forward_backward

    def poisoned(*given):
        loss = honest(*given)
        if trainer.progress.step == 0:
            next(trainer.model.parameters()).grad.fill_(float("nan"))
        return loss

    trainer.engine.forward_backward = poisoned


def test_skipped_steps_are_written_down_with_their_samples(tiny, prepared, tmp_path):
    settings = tiny(training__skip_limit=1, training__async_save=True, training__save_every=2)
    trainer = Trainer(settings, prepared)
    honest = trainer.engine.forward_backward

    def poisoned(*given):
        loss = honest(*given)
        if trainer.progress.step in (1, 3, 4):
            next(trainer.model.parameters()).grad.fill_(float("inf"))
        return loss

    trainer.engine.forward_backward = poisoned
    with pytest.raises(FloatingPointError, match=r"2 steps in a row.*samples 32 to 39.*nonfinite"):
        trainer.run()
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())["skipped"]
    assert [line["step"] for line in found] == [4, 5]
    assert found[0]["samples"] == list(range(24, 32))
    assert float(found[1]["loss"]) > 0 and found[1]["gradient_norm"] in ("inf", "nan")
    assert names(tmp_path / "run") == ["latest", step(2), step(4)]


def test_a_checkpoint_in_the_making_outlives_another_error(tiny, prepared, tmp_path):
    """A loader's worker may be killed, or a batch not fit, while an older step is being written."""

    def watch(at):
        if at.progress.step == 3:
            raise RuntimeError("a worker is gone")

    settings = tiny(training__async_save=True, training__save_every=2)
    trainer = Trainer(settings, prepared, watch=watch)
    trainer.saver.finish_if = lambda ready: None  # still being written
    with pytest.raises(RuntimeError, match="a worker is gone"):
        trainer.run()
    assert checkpoint.newest(tmp_path / "run").name == step(2)
