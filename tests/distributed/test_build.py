"""The weights that a layout begins with are those of one process, each shard drawn alone."""

import pytest
import torch

from megaarch.distributed.mesh import Grid
from megaarch.model.initialize import initial_value
from megaarch.parallel.parallelize import build
from tests.distributed import runs

LAYOUTS = {
    "rows": (3, {"parallel.data_parallel_shard": 3}),  # uneven
    "columns": (2, {"parallel.tensor_parallel": 2}),
    "both": (4, {"parallel.data_parallel_shard": 2, "parallel.tensor_parallel": 2}),
    "hsdp": (4, {"parallel.data_parallel_shard": 2, "parallel.data_parallel_replicate": 2}),
    "pipeline": (4, {"parallel.pipeline_parallel": 2, "parallel.data_parallel_shard": 2}),
    "uneven both": (
        6,
        {
            "parallel.data_parallel_shard": 3,
            "parallel.tensor_parallel": 2,
            "model.feed_forward_size": 50,
        },
    ),
    "t5x's": (
        4,
        {
            "parallel.data_parallel_shard": 2,
            "parallel.tensor_parallel": 2,
            "model.initializer": "t5x",
            "model.position_encoding": "relative",
        },
    ),
}


def built(raw, preset, given, block):
    """This rank's part of the model, each parameter whole; how many elements were drawn for it."""
    drawn, honest = [], torch.randn

    def randn(size, generator):
        drawn.append(size)
        return honest(size, generator=generator)

    initial_value.__globals__["BLOCK"] = block
    torch.randn = randn
    settings = runs.settings_of(raw, preset, given)
    model = build(settings, Grid.build(settings.parallel, "cpu"))
    return {n: runs.whole(p.detach()) for n, p in model.named_parameters()}, sum(drawn)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shard_is_a_slice_of_the_whole_draw(layout, pool, raw, monkeypatch):
    monkeypatch.setitem(initial_value.__globals__, "BLOCK", 97)
    ranks, given = LAYOUTS[layout]
    given = given | {"training.global_batch_size": 24, "training.micro_batch_size": 2}
    settings = runs.settings_of(raw, "t5", given)
    for whole, _ in pool.run(ranks, built, raw, "t5", given, 97):
        assert any(value.numel() > 97 for value in whole.values())
        for name, value in whole.items():
            wanted = initial_value(name, tuple(value.shape), settings.model, settings.training.seed)
            assert torch.equal(value, wanted), name


def test_a_rank_draws_little_more_than_its_shards(pool, raw):
    ((whole, _),) = pool.run(1, built, raw, "gpt", {}, 97)
    elements = sum(value.numel() for value in whole.values())
    for _, drawn in pool.run(4, built, raw, "gpt", {"parallel.data_parallel_shard": 4}, 97):
        assert drawn < 0.4 * elements
