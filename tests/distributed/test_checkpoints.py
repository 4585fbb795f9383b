"""Checkpoints know no layout: a run continues in another one, and is scored in another one."""

import json
from contextlib import suppress

import pytest
import torch
from torch import distributed

from megaarch.study import evaluate
from megaarch.training import checkpoint
from tests.distributed import runs

TP_PP = {"parallel.tensor_parallel": 2, "parallel.pipeline_parallel": 2}
FSDP2 = {"parallel.data_parallel_shard": 2}
FSDP4 = {"parallel.data_parallel_shard": 4}
PP4 = {"parallel.pipeline_parallel": 4}
PP2_FSDP2 = {"parallel.pipeline_parallel": 2, "parallel.data_parallel_shard": 2}
CP_FSDP = {"parallel.context_parallel": 2, "parallel.data_parallel_shard": 2}


class Stop(Exception):
    pass


def train_to(raw, given, steps):
    """Runs on towards step 6 and is stopped past step `steps`, of which there is a checkpoint."""
    settings = runs.settings_of(raw, "t5", given | {"training.steps": 6, "training.save_every": 2})
    trainer = runs.trainer_of(settings)
    start = trainer.progress.step

    def stop(step):
        if step.progress.step > steps:
            raise Stop

    trainer.watch = stop
    with suppress(Stop):
        trainer.run()
    return start, runs.weights(trainer)


@pytest.mark.parametrize(
    "optimizer, layouts",
    [
        ("adamw", [(4, TP_PP), (4, FSDP4), (4, PP4)]),
        ("adamw", [(2, FSDP2), (1, {}), (4, CP_FSDP)]),
        ("adafactor", [(2, {"parallel.tensor_parallel": 2}), (2, FSDP2), (1, {})]),
    ],
)
def test_a_run_continues_in_other_layouts(optimizer, layouts, pool, raw, prepared, tmp_path):
    def given(name):
        return {"logging.directory": str(tmp_path / name), "training.optimizer": optimizer}

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    _, wanted = train_to(raw, given("whole"), 6)
    for number, (world_size, layout) in enumerate(layouts):
        ranks = pool.run(world_size, train_to, raw, given("moved") | layout, 2 * number + 2)
        assert {start for start, _ in ranks} == {2 * number}
    assert losses("moved") == pytest.approx(losses("whole"), rel=1e-5)
    found = {}
    for _, weights in ranks:
        for name, value in weights.items():
            assert torch.equal(found.setdefault(name, value), value), name
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert runs.distance(found[name], value) < 1e-4, name


def broken_save(raw, given):
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    trainer.train_step(trainer.steps[0])
    checkpoint.find_fault = lambda path: "it is made up"
    try:
        trainer.save()
    except OSError as error:
        distributed.barrier()
        return str(error)


def test_a_save_that_fails_is_told_to_every_rank_and_leaves_nothing(pool, raw, prepared, tmp_path):
    given = {"logging.directory": str(tmp_path / "run")} | FSDP2
    for told in pool.run(2, broken_save, raw, given):
        assert "does not read back as written: it is made up" in told
    assert checkpoint.newest(tmp_path / "run") is None


def scored(run, layout, smaller):
    whole = evaluate.Evaluation
    evaluate.Evaluation = lambda: whole(**smaller)
    try:
        return evaluate.evaluate_run(run, [f"{name}={size}" for name, size in layout.items()])
    finally:
        evaluate.Evaluation = whole


@pytest.mark.parametrize(
    "preset, layout", [("prefix_lm", CP_FSDP), ("t5", TP_PP), ("xlnet", TP_PP), ("gpt", PP2_FSDP2)]
)
def test_the_yardsticks_of_a_layout_equal_those_of_one_process(
    preset, layout, pool, raw, prepared, tmp_path
):
    smaller = {"documents": 6, "choices": 4, "middles": 2, "batch_rows": 4}
    smaller |= {"prefix_tokens": 12, "continuation_tokens": 6}
    given = {"logging.directory": str(tmp_path / "run"), "training.steps": 2}
    runs.trainer_of(runs.settings_of(raw, preset, given)).run()
    wanted = scored(tmp_path / "run", {}, smaller)
    assert wanted["items"]["continuation"] == 6 and wanted["items"]["choice"] == 4
    for found in pool.run(4, scored, tmp_path / "run", layout, smaller):
        assert found.keys() == wanted.keys()
        assert found["items"] == wanted["items"]
        assert found["choice_accuracy"] == wanted["choice_accuracy"]
        for name, value in wanted.items():
            if name.endswith(("_per_byte", "_raw")) and value is not None:
                assert found[name] == pytest.approx(value, rel=1e-5), name
