"""The grid of processes: places, groups and sums; layouts that do not fit are told at once."""

import itertools

import pytest
import torch

from megaarch.config import ConfigError
from megaarch.config.schema import Parallel
from megaarch.distributed.mesh import AXES, DATA, GRADIENT, Grid
from megaarch.parallel.validate import check

SIZES = {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2}


def parallel(sizes):
    return Parallel(**{AXES[axis]: size for axis, size in sizes.items()})


def place(sizes):
    grid = Grid.build(parallel(sizes), "cpu")
    one = torch.ones(())
    return {
        "ranks": tuple(grid.rank(axis) for axis in AXES),
        "sizes": tuple(grid.size(axis) for axis in AXES),
        "groups": tuple(axis for axis in AXES if grid.group(axis) is not None),
        "data": (grid.data_rank, grid.data_ranks, grid.gradient_ranks, grid.row_multiple),
        "main": grid.is_main,
        "sums": (float(grid.sum(one.clone(), DATA)), float(grid.sum(one.clone(), GRADIENT))),
        "mine": float(grid.sum(torch.tensor(float(grid.rank("tp"))), ("tp",))),
        "shared": grid.share(f"from {grid.data_rank}" if grid.is_main else None),
        "submesh": grid.submesh("pp", "tp").mesh.tolist(),
        "world": grid.world_size,
    }


def test_eight_processes_have_each_place_once_and_tp_innermost(pool):
    found = pool.run(8, place, SIZES)
    wanted = list(itertools.product(*(range(size) for size in SIZES.values())))
    assert [f["ranks"] for f in found] == wanted
    for rank, f in enumerate(found):
        assert f["sizes"] == tuple(SIZES.values()) and f["world"] == 8
        assert f["groups"] == ("pp", "dp_shard", "tp")
        assert f["data"] == (wanted[rank][2], 2, 2, 2)
        assert f["main"] == (rank == 0)
        assert f["sums"] == (2.0, 2.0) and f["mine"] == 1.0
        assert f["shared"] == "from 0"
    assert found[0]["submesh"] == [[0, 1], [4, 5]]


def test_rows_are_dealt_over_copies_and_shards_and_gradients_over_cp_too(pool):
    sizes = {"dp_replicate": 2, "dp_shard": 2, "cp": 2}
    found = pool.run(8, place, sizes)
    assert [f["data"][0] for f in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {f["data"][1:] for f in found} == {(4, 8, 2)}
    assert {f["sums"] for f in found} == {(4.0, 8.0)}


def test_one_process_needs_no_process_group():
    grid = Grid.build(Parallel(), "cpu")
    assert grid.mesh is None and grid.is_main and grid.world_size == 1
    assert grid.data_rank == 0 and grid.data_ranks == grid.gradient_ranks == grid.row_multiple == 1
    assert all(grid.group(axis) is None and grid.size(axis) == 1 for axis in AXES)
    assert float(grid.sum(torch.ones(()), GRADIENT)) == 1.0 and grid.share("it") == "it"


@pytest.mark.parametrize(
    "given, world_size, words",
    [
        ({"tensor_parallel": 2}, 1, "tensor_parallel 2 needs 2 processes and 1 process was"),
        ({}, 4, "4 processes were started and the layout is of one.*data_parallel_shard=4"),
        ({"context_parallel": 2, "tensor_parallel": 4}, 8, "4 heads do not divide among"),
        ({"pipeline_parallel": 4}, 4, "model's 2 layers"),
        ({"stages_per_rank": 2}, 1, "2 stages on a rank are of a pipeline, and there is none"),
        ({"data_parallel_shard": 4, "tensor_parallel": 2}, 4, "needs 8 processes and 4"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_starts(given, world_size, words, tiny):
    settings = tiny(
        training__global_batch_size=16,
        training__micro_batch_size=1,
        **{f"parallel__{name}": value for name, value in given.items()},
    )
    with pytest.raises(ConfigError, match=words):
        check(settings, world_size)


def test_fewer_key_heads_than_ranks_fit_and_all_mistakes_are_told_at_once(tiny):
    check(tiny(parallel__tensor_parallel=4, model__kv_heads=1), 4)
    three = {"model__heads": 12, "model__head_size": 8, "model__kv_heads": 3}
    check(tiny(parallel__context_parallel=2, **three), 2)  # they are repeated, as often as needed
    with pytest.raises(ConfigError, match=r"3 key heads neither divide among 2 ranks \(parallel.t"):
        check(tiny(parallel__tensor_parallel=2, **three), 2)
    wrong = tiny(
        parallel__tensor_parallel=3,
        model__heads=12,
        model__head_size=8,
        model__kv_heads=2,
        model__feed_forward_size=50,
    )
    with pytest.raises(ConfigError) as told:
        check(wrong, 1)
    assert len(told.value.problems) == 4
    assert [p.split(":")[0] for p in told.value.problems] == [
        "parallel",
        "model.kv_heads",
        "model.feed_forward_size",
        "model.vocabulary_size",
    ]
