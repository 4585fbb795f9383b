"""Every preset in the tensor and pipeline layouts, through the trainer, equals one process; and the
larger combinations for a causal decoder, an encoder-decoder and two streams."""

import pytest

from tests.conftest import PRESETS
from tests.distributed import runs

DEEPER = {"model.layers": 3}  # odd, and enough layers for four stages of an encoder-decoder


def layout(**sizes: int) -> dict[str, int]:
    return {f"parallel.{name}": size for name, size in sizes.items()}


TP2 = layout(tensor_parallel=2)
PP2 = layout(pipeline_parallel=2)
CP2 = layout(context_parallel=2)
FSDP2 = layout(data_parallel_shard=2)
EVERY = {"tp2": (2, TP2), "pp2": (2, PP2), "tp2 x pp2": (4, TP2 | PP2)}
PAIRS = {
    "tp2 x fsdp2": (4, TP2 | FSDP2),
    "pp2 x fsdp2": (4, PP2 | FSDP2),
    "cp2 x tp2": (4, CP2 | TP2),
    "tp2 x pp2 x fsdp2": (8, TP2 | PP2 | FSDP2),
    "tp2 x pp2 x cp2": (8, TP2 | PP2 | CP2),
}


@pytest.fixture(scope="module")
def single(raw, prepared):
    """Runs of one process."""
    return runs.run(raw, list(PRESETS), DEEPER)


@pytest.mark.parametrize("name", EVERY)
def test_every_preset_equals_one_process(name, pool, raw, single):
    ranks, given = EVERY[name]
    found = runs.merge(pool.run(ranks, runs.run, raw, list(PRESETS), DEEPER | given))
    for preset in PRESETS:
        runs.compare(found[preset], single[preset], f"{preset} {name}", 1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_combinations_equal_one_process(name, pool, raw, single):
    ranks, given = PAIRS[name]
    presets = ["gpt", "t5", "xlnet"]
    found = runs.merge(pool.run(ranks, runs.run, raw, presets, DEEPER | given))
    for preset in presets:
        runs.compare(found[preset], single[preset], f"{preset} {name}", 1e-5)
