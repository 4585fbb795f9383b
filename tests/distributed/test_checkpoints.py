"""Checkpoints know no layout: a run continues in another one, and is scored in another one."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import distributed

from megaarch.checkpoint import checkpoint, manifest
from megaarch.checkpoint.retention import complete
from megaarch.study import evaluate_run
from tests.distributed import runs
from tests.distributed.layouts import FACTORED, LAYOUTS

TP_PP = {"parallel.tensor_parallel": 2, "parallel.pipeline_parallel": 2}
FSDP2 = {"parallel.data_parallel_shard": 2}
FSDP4 = {"parallel.data_parallel_shard": 4}
PP4 = {"parallel.pipeline_parallel": 4}
PP2_FSDP2 = {"parallel.pipeline_parallel": 2, "parallel.data_parallel_shard": 2}
CP_FSDP = {"parallel.context_parallel": 2, "parallel.data_parallel_shard": 2}


class Stop(Exception):
    pass


def train_to(raw, given, steps, preset="t5"):
    """Runs on towards step 8 and is stopped past step `steps`, of which there is a checkpoint."""
    settings = runs.settings_of(
        raw, preset, given | {"training.steps": 8, "training.save_every": 2}
    )
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
        ("adamw", [(4, TP_PP), (4, FSDP4), (1, {}), (4, PP4)]),
        ("adamw", [(2, FSDP2), (4, TP_PP), (4, CP_FSDP), (1, {})]),
        ("adafactor", [(2, {"parallel.tensor_parallel": 2}), (2, FSDP2), (1, {}), (2, FSDP2)]),
    ],
)
def test_a_run_continues_in_other_layouts(optimizer, layouts, pool, raw, prepared, tmp_path):
    own = {"training.optimizer": optimizer} | (FACTORED if optimizer == "adafactor" else {})

    def given(name):
        return own | {"logging.directory": str(tmp_path / name)}

    _, wanted = train_to(raw, given("whole"), 8)
    for number, (world_size, layout) in enumerate(layouts):
        ranks = pool.run(world_size, train_to, raw, given("moved") | layout, 2 * number + 2)
        assert {start for start, _ in ranks} == {2 * number}
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    found = {}
    for _, weights in ranks:
        for name, value in weights.items():
            assert torch.equal(found.setdefault(name, value), value), name
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert runs.distance(found[name], value) < 1e-4, name


def test_weights_are_read_whole_whatever_layout_wrote_them(pool, raw, prepared, tmp_path):
    given = {"logging.directory": str(tmp_path / "run")}
    ranks = pool.run(4, train_to, raw, given | TP_PP, 8)
    found = checkpoint.read_weights(checkpoint.newest(tmp_path / "run"))
    wanted = {name: value for _, weights in ranks for name, value in weights.items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def bytes_read(raw, given, path):
    """(bytes that this rank reads to load weights, bytes of all weights)"""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))

    def read():
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))

    before = read()
    checkpoint.load(path, trainer.engine, None)
    taken = read() - before
    return taken, sum(tensor.nbytes for tensor in checkpoint.read_weights(path).values())


def test_a_rank_reads_the_rows_that_it_holds_of_whole_weights(pool, raw, prepared, tmp_path):
    """Of a weight that is divided by columns it reads all, at one time one."""
    wide = {"model.hidden_size": 256, "model.heads": 4, "model.feed_forward_size": 1024}
    given = wide | {"logging.directory": str(tmp_path / "run")}
    [(_, weights)] = pool.run(1, train_to, raw, given, 2, "gpt")
    record = checkpoint.read_record(checkpoint.newest(tmp_path / "run"))
    path = checkpoint.save_weights(tmp_path / "whole", weights, record)
    given |= {"logging.directory": str(tmp_path / "other")}
    for layout, most in ((FSDP2, 0.6), ({"parallel.tensor_parallel": 2}, 0.8)):
        for taken, whole in pool.run(2, bytes_read, raw, given | layout, path):
            assert 0.4 * whole < taken < most * whole, layout


def broken_save(raw, given):
    """What every rank is told where rank 1 reads other than it wrote."""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    trainer.step(trainer.steps[0])
    honest = manifest.size_and_checksum
    if distributed.get_rank() == 1:
        values = iter(range(100))
        manifest.size_and_checksum = lambda file: (file.stat().st_size, next(values))
    try:
        trainer.save()
    except OSError as error:
        distributed.barrier()
        return str(error)
    finally:
        manifest.size_and_checksum = honest


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_that_fails_is_told_to_every_rank_and_leaves_nothing(
    async_save, pool, raw, prepared, tmp_path
):
    given = {"logging.directory": str(tmp_path / "run"), "training.async_save": async_save} | FSDP2
    for told in pool.run(2, broken_save, raw, given):
        assert "does not read back as written: state/__1_0.distcp has a wrong checksum" in told
    assert checkpoint.newest(tmp_path / "run") is None


def reading(raw, given):
    """Names of the files that this rank reads: to save a checkpoint, and to go on from it."""
    honest, read = manifest.size_and_checksum, []
    manifest.size_and_checksum = lambda file: read.append(file.name) or honest(file)
    try:
        trainer = runs.trainer_of(runs.settings_of(raw, "t5", given))
        trainer.step(trainer.steps[0])
        trainer.save()
        saved, read[:] = list(read), []
        runs.trainer_of(trainer.settings)
        return saved, list(read)
    finally:
        manifest.size_and_checksum = honest


@pytest.mark.parametrize("async_save", [False, True])
def test_each_rank_reads_what_it_wrote_and_a_share_of_what_is_there(
    async_save, pool, raw, prepared, tmp_path
):
    given = {"logging.directory": str(tmp_path / "run"), "training.async_save": async_save}
    ranks = pool.run(4, reading, raw, given | TP_PP)
    listed = json.loads((checkpoint.newest(tmp_path / "run") / "manifest.json").read_text())
    names = [name.rpartition("/")[2] for name in listed]
    assert sorted(names) == sorted(["metadata.json", "progress.json", *shards(4)])
    for rank, (saved, _) in enumerate(ranks):
        own = [name for name in saved if name.endswith(".distcp")]
        assert set(own) == {f"__{rank}_0.distcp"}
        assert rank == 0 or own == saved
    assert sorted(name for _, resumed in ranks for name in resumed) == sorted(names)
    assert {len(resumed) for _, resumed in ranks} == {1, 2}


def shards(ranks):
    return [f"__{rank}_0.distcp" for rank in range(ranks)]


def found_by(raw, run, layout):
    """What a rank of `layout` says of a run's checkpoints."""
    grid = runs.trainer_of(runs.settings_of(raw, "gpt", layout)).grid
    faults = [manifest.find_fault(path, grid) for path in complete(run / "checkpoints")]
    try:
        return faults, checkpoint.newest(run, grid).name
    except ValueError as error:
        return faults, str(error)


def test_damage_that_one_rank_sees_is_named_on_all_and_skipped(pool, raw, prepared, tmp_path):
    run = tmp_path / "run"
    given = {"logging.directory": str(run), "training.keep_checkpoints": 0} | FSDP4
    pool.run(4, train_to, raw, given, 8)
    elsewhere = {"logging.directory": str(tmp_path / "elsewhere")} | FSDP4
    paths = complete(run / "checkpoints")
    assert [path.name[-1] for path in paths] == ["2", "4", "6", "8"]
    for path, shard in zip(paths[1:], shards(4)[1:], strict=True):
        file = path / "state" / shard
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    wanted = [None, *(f"state/{name} has a wrong checksum" for name in shards(4)[1:])]
    for found in pool.run(4, found_by, raw, run, elsewhere):
        assert found == (wanted, "step-00000002")
    (paths[0] / "state" / shards(4)[3]).unlink()
    for _, told in pool.run(4, found_by, raw, run, elsewhere):
        assert "step-00000002 is damaged (state/__3_0.distcp is missing)" in told
        assert "none before it" in told


def loaded_by(raw, given, path):
    """What this rank says of a checkpoint that it loads unchecked; None where nothing is wrong."""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    try:
        checkpoint.load(path, trainer.engine, None)
    except OSError as error:
        return str(error)


def test_a_rank_that_cannot_read_its_shard_is_named_on_all(pool, raw, prepared, tmp_path):
    given = {"logging.directory": str(tmp_path / "run")} | FSDP2
    pool.run(2, train_to, raw, given, 2, "gpt")
    path = complete(tmp_path / "run" / "checkpoints")[-1]
    given |= {"logging.directory": str(tmp_path / "other")}
    assert pool.run(2, loaded_by, raw, given, path) == [None, None]
    shard = path / "state" / "__1_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    first, second = pool.run(2, loaded_by, raw, given, path)
    assert first == second
    assert first.startswith("rank 1: model.") and "\n" not in first
    assert first.endswith(
        f" of {path}/state could not be read: its bytes are not those of plain tensors"
    )


def scored(run, layout, smaller):
    find_fault, read = manifest.find_fault, []
    manifest.find_fault = lambda path, *grid: read.append(path) or find_fault(path, *grid)
    try:
        given = [f"{name}={size}" for name, size in layout.items()]
        given += [f"study.evaluation.{name}={number}" for name, number in smaller.items()]
        return evaluate_run.evaluate_run(run, given)[0].as_json() | {"verified": len(read)}
    finally:
        manifest.find_fault = find_fault


@pytest.mark.parametrize(
    "preset, name",
    [*(("t5", name) for name in LAYOUTS), ("prefix_lm", "cp2 x tp2"), ("xlnet", "tp2 x pp2")],
)
def test_the_yardsticks_of_a_layout_equal_those_of_one_process(
    preset, name, pool, raw, prepared, tmp_path
):
    ranks, layout, deeper = LAYOUTS[name]
    smaller = {"documents": 6, "choices": 4, "middles": 2, "batch_rows": 16}
    smaller |= {"prefix_tokens": 12, "continuation_tokens": 6}
    given = {"logging.directory": str(tmp_path / "run"), "training.steps": 2} | deeper
    runs.trainer_of(runs.settings_of(raw, preset, given)).run()
    wanted = scored(tmp_path / "run", {}, smaller)
    assert wanted["items"]["continuation"] == 6 and wanted["items"]["choice"] == 4
    for found in pool.run(ranks, scored, tmp_path / "run", layout, smaller):
        assert found["verified"] == wanted["verified"] == 1, "a share on each rank"
        assert found.keys() == wanted.keys()
        assert found["items"] == wanted["items"]
        assert found["choice_accuracy"] == wanted["choice_accuracy"]
        for name, value in wanted.items():
            if name.endswith(("_per_byte", "_raw")) and value is not None:
                assert found[name] == pytest.approx(value, rel=1e-5), name


def test_a_run_is_scored_by_ranks_among_which_its_batch_does_not_divide(
    pool, raw, prepared, tmp_path
):
    smaller = {"documents": 6, "choices": 4, "middles": 2, "batch_rows": 16}
    smaller |= {"prefix_tokens": 12, "continuation_tokens": 6}
    given = {"logging.directory": str(tmp_path / "run"), "training.steps": 1, "model.layers": 3}
    runs.trainer_of(runs.settings_of(raw, "gpt", given)).run()
    bits = "continuation_bits_per_byte"
    wanted = scored(tmp_path / "run", {}, smaller)[bits]
    for layout in ({"parallel.data_parallel_shard": 3}, {"parallel.pipeline_parallel": 3}):
        layout |= {"training.micro_batch_size": 3}
        for found in pool.run(3, scored, tmp_path / "run", layout, smaller):
            assert found[bits] == pytest.approx(wanted, rel=1e-5)


def started(raw, given):
    """Runs to the end; returns the weights from before the first step."""
    trainer = runs.trainer_of(runs.settings_of(raw, "t5", given))
    before = runs.weights(trainer)
    trainer.run()
    return before


@pytest.mark.parametrize("kv_heads, layout", [(1, TP_PP), (2, PP2_FSDP2)])
def test_an_encoder_decoder_starts_from_a_decoder_in_any_layout(
    kv_heads, layout, pool, raw, prepared, tmp_path
):
    own = {"model.kv_heads": kv_heads, "training.steps": 2}
    decoder = own | {"logging.directory": str(tmp_path / "gpt")}
    runs.trainer_of(runs.settings_of(raw, "gpt", decoder)).run()
    own |= {"training.start_from": str(tmp_path / "gpt")}
    wanted = started(raw, own | {"logging.directory": str(tmp_path / "whole")})
    found = {}
    given = own | layout | {"logging.directory": str(tmp_path / "split")}
    for weights in pool.run(4, started, raw, given):
        found |= weights
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


DEEPSPEED = {"parallel.engine": "deepspeed", "parallel.data_parallel_shard": 2}


@pytest.mark.parametrize("layout", [FSDP2, DEEPSPEED], ids=["fsdp", "deepspeed"])
def test_an_optimizer_is_taken_along_into_another_layout(layout, pool, raw, prepared, tmp_path):
    def given(name, **more):
        return {"logging.directory": str(tmp_path / name), "training.schedule": "constant"} | more

    for name, steps in (("whole", 6), ("first", 3)):
        settings = runs.settings_of(raw, "t5", given(name, **{"training.steps": steps}))
        runs.trainer_of(settings).run()
    along = {
        "training.start_from": str(tmp_path / "first"),
        "training.start_optimizer": True,
        "training.steps": 6,
    }
    pool.run(2, started, raw, given("second", **along) | layout)
    both = losses(tmp_path / "first") + losses(tmp_path / "second")
    assert both == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
