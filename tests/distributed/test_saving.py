"""Saving in the background, and steps that are not finite, in every layout."""

import json
import sys
from contextlib import suppress

import pytest
import torch
from torch import distributed

from megaarch.checkpoint import checkpoint, storage
from megaarch.errors import UserError
from megaarch.training.trainer import Trainer
from tests.distributed import runs
from tests.distributed.layouts import TWO_RANKS


class Stop(Exception):
    pass


def broken_and_whole(raw, preset, given, directory):
    """Losses and final weights of a run with background saves, broken off past its last save and
    continued, and of one that saves at once."""
    found = []
    for name, background in (("whole", False), ("broken", True)):
        mine = {"logging.directory": f"{directory}/{name}", "training.async_save": background}
        settings = runs.settings_of(raw, preset, given | mine | {"training.save_every": 1})
        trainer = runs.trainer_of(settings)

        def stop(step):
            if step.progress.step == 4:
                raise Stop

        if background:
            trainer.watch = stop
            with suppress(Stop):
                trainer.run()
            trainer.saver.finish()
            trainer = runs.trainer_of(settings)
            assert trainer.progress.step == 3
        trainer.run()
        found.append(runs.weights(trainer))
    return found


@pytest.mark.parametrize("preset, layout", [("gpt", "fsdp2"), ("t5", "pp2"), ("xlnet", "tp2")])
def test_a_run_continues_from_background_saves_bit_for_bit(
    preset, layout, pool, raw, prepared, tmp_path
):
    for whole, broken in pool.run(2, broken_and_whole, raw, preset, TWO_RANKS[layout], tmp_path):
        assert whole.keys() == broken.keys()
        for name, value in whole.items():
            assert torch.equal(value, broken[name]), name


def fail_on_rank_1(raw, given):
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    trainer.step(trainer.steps[0])
    trainer.save()
    trainer.step(trainer.steps[1])
    if distributed.get_rank() == 1:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        storage.Writer.write_data = full
    try:
        trainer.save()
    except OSError as error:
        return str(error)


def test_a_rank_that_cannot_write_is_named_on_every_rank(pool, raw, prepared, tmp_path):
    given = TWO_RANKS["pp2"] | {"training.async_save": True}
    given |= {"logging.directory": str(tmp_path / "run")}
    for told in pool.run(2, fail_on_rank_1, raw, given):
        assert "step-00000002 could not be written: rank 1: OSError" in told and "space" in told
    assert checkpoint.newest(tmp_path / "run").name == "step-00000001"


def fall_on_rank_1(raw, given):
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    if distributed.get_rank() == 1:

        def fallen(*_, **__):
            raise MemoryError("no memory for a copy")

        checkpoint.state_of = fallen
    try:
        with trainer.grid.on_main():
            checkpoint.state_of(trainer.engine, trainer.optimizer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_that_nobody_expects_ends_all_ranks_too(pool, raw, prepared, tmp_path):
    given = TWO_RANKS["pp2"] | {"logging.directory": str(tmp_path / "run")}
    assert pool.run(2, fall_on_rank_1, raw, given) == [
        "RuntimeError: MemoryError of another process: no memory for a copy",
        "MemoryError: no memory for a copy",
    ]


def run_without_wandb(raw, given):
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given | {"logging.wandb": True}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(UserError) as told:
            trainer.run()
    return str(told.value)


def test_a_mistake_in_where_metrics_go_is_one_of_all_ranks(pool, raw, prepared, tmp_path):
    given = TWO_RANKS["fsdp2"] | {"logging.directory": str(tmp_path / "run")}
    first, second = pool.run(2, run_without_wandb, raw, given)
    assert first == second and "logging.wandb: Weights & Biases is not installed" in first


def poisoned_on_rank_1(raw, given):
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    honest = trainer.engine.forward_backward

    def poisoned(*given):
        loss = honest(*given)
        if distributed.get_rank() == 1 and trainer.progress.step >= 1:
            last = [p for p in trainer.model.parameters() if p.grad is not None][-1]
            last.grad.mul_(float("nan"))
        return loss

    trainer.engine.forward_backward = poisoned
    try:
        trainer.run()
    except FloatingPointError as error:
        return str(error), trainer.progress.skipped


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_one_ranks_gradient_ends_the_run_of_all(layout, pool, raw, prepared, tmp_path):
    given = TWO_RANKS[layout] | {"training.skip_limit": 1}
    given |= {"logging.directory": str(tmp_path / "run")}
    told = pool.run(2, poisoned_on_rank_1, raw, given)
    assert told[0] == told[1] and told[0][1] == 1
    assert "2 steps in a row, up to step 3 with samples 16 to 23" in told[0][0]
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())["skipped"]
    assert [line["step"] for line in found] == [2, 3]


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_begins_the_count_of_lost_ranks_anew(
    background, tiny, prepared, tmp_path, monkeypatch
):
    losses = tmp_path / "losses"
    losses.write_text("a start that lost a rank\n")
    monkeypatch.setenv("MEGAARCH_LOSSES", str(losses))
    Trainer(tiny("gpt", training__async_save=background, training__save_every=2), prepared).run()
    assert not losses.exists()


def one_step(raw, given):
    runs.trainer_of(runs.settings_of(raw, "gpt", given)).run()


@pytest.mark.parametrize(
    ("layout", "wanted"), [("fsdp2", {"__0_0"}), ("tp2", {"__0_0"}), ("pp2", {"__0_0", "__1_0"})]
)
def test_plain_values_are_planned_by_one_rank_of_a_stage(
    layout, wanted, pool, raw, prepared, tmp_path
):
    """An optimizer has several for each parameter, and each rank's plan goes to one rank."""
    given = TWO_RANKS[layout] | {"logging.directory": str(tmp_path), "training.save_every": 1}
    pool.run(2, one_step, raw, given | {"training.steps": 1})
    index = storage.read_index(checkpoint.find(tmp_path) / "state")
    files = {file.removesuffix(".distcp") for file, *_ in index.values.values()}
    assert len(index.values) > 20 and files == wanted
