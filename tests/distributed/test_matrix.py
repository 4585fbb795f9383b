"""Every preset in the tensor and pipeline layouts, through the trainer, equals one process; and the
other layouts and combinations for a causal decoder, an encoder-decoder and two streams. The whole
matrix, in fp64 too: `python -m tests.distributed.matrix`."""

from functools import lru_cache

import pytest

from megaarch.parallel import compile
from tests.conftest import PRESETS
from tests.distributed import runs
from tests.distributed.layouts import CP2, DEEPER, FACTORED, FSDP2, LARGER, LAYOUTS, PP2, TP2

THREE = ("gpt", "t5", "xlnet")
EVERY = ("tp2", "pp2", "tp2 x pp2")
# steps of tensor parallelism are slow on a CPU: two micro-batches each in place of four
BRIEFER = {
    name: {"training.global_batch_size": 4}
    for name in ("tp2", "tp2 x pp2", "cp2 x tp2", "tp2 x pp2 x cp2")
}
COMBINED = {**{name: LAYOUTS[name] for name in LAYOUTS if name not in EVERY}, **LARGER}


@pytest.fixture(scope="module")
def single(raw, prepared):
    """single(presets, settings): runs of one process."""

    @lru_cache
    def of(preset, given):
        return runs.run(raw, [preset], dict(given))[preset]

    return lambda presets, given: {p: of(p, tuple(given.items())) for p in presets}


@pytest.mark.parametrize("name", EVERY)
def test_every_preset_equals_one_process(name, pool, raw, single):
    ranks, given, deeper = LAYOUTS[name]
    deeper = deeper | BRIEFER.get(name, {})
    found = runs.merge(pool.run(ranks, runs.run, raw, list(PRESETS), deeper | given))
    wanted = single(PRESETS, deeper)
    for preset in PRESETS:
        runs.compare(found[preset], wanted[preset], f"{preset} {name}", 1e-5)


@pytest.mark.parametrize("name", COMBINED)
def test_other_layouts_equal_one_process(name, pool, raw, single):
    ranks, given, deeper = COMBINED[name]
    deeper = deeper | BRIEFER.get(name, {})
    found = runs.merge(pool.run(ranks, runs.run, raw, list(THREE), deeper | given))
    wanted = single(THREE, deeper)
    for preset in THREE:
        runs.compare(found[preset], wanted[preset], f"{preset} {name}", 1e-5)


@pytest.mark.parametrize(
    "ranks, given, size",
    [
        (2, TP2, FACTORED),
        (2, FSDP2, FACTORED),
        (4, TP2 | FSDP2, FACTORED),
        (2, TP2, FACTORED | {"model.head_size": 128, "model.kv_heads": 1}),
    ],
    ids=["tp2", "fsdp2", "tp2 x fsdp2", "tp2, a shared key head"],
)
def test_adafactor_equals_one_process(ranks, given, size, pool, raw, single):
    settings = DEEPER | BRIEFER["tp2"] | {"training.optimizer": "adafactor"} | size
    found = runs.merge(pool.run(ranks, runs.run, raw, list(THREE), settings | given))
    wanted = single(THREE, settings)
    for preset in THREE:
        runs.compare(found[preset], wanted[preset], f"{preset} {given}", 1e-5)


@pytest.mark.parametrize("name", ["tp2", "pp2", "cp2"])
def test_middles_equal_one_process(name, pool, raw, single):
    """fill_in_middle, which no preset has by itself: rows of three kinds, of which two are blocks of a prefix."""
    ranks, given, deeper = LAYOUTS[name]
    settings = deeper | BRIEFER["tp2"] | {"data.objective": "fill_in_middle"}
    found = runs.merge(pool.run(ranks, runs.run, raw, ["gpt", "prefix_lm"], settings | given))
    wanted = single(("gpt", "prefix_lm"), settings)
    for preset in ("gpt", "prefix_lm"):
        runs.compare(found[preset], wanted[preset], f"{preset} {name}", 1e-5)


def test_stages_hand_on_what_one_process_keeps_in_bf16(pool, raw, single):
    """The residual stream is bf16, between stages too."""
    settings = DEEPER | {"training.precision": "bf16", "training.steps": 2}
    found = runs.merge(pool.run(2, runs.run, raw, ["gpt", "t5"], settings | PP2))
    wanted = single(("gpt", "t5"), settings)
    for preset in ("gpt", "t5"):
        runs.compare(found[preset], wanted[preset], f"{preset} bf16", 1e-5)


@pytest.mark.parametrize("name", ["tp2", "pp2", "cp2", "fsdp2"])
def test_bf16_means_the_same_in_every_layout(name, pool, raw, single):
    """bf16 parameters and stream under fp32 masters: 20 losses within 2e-3 of one process."""
    ranks, given, deeper = LAYOUTS[name]
    brief = {"training.global_batch_size": 4, "training.steps": 20, "training.precision": "bf16"}
    settings = deeper | brief
    found = runs.merge(pool.run(ranks, runs.run, raw, ["gpt", "t5"], settings | given))
    wanted = single(("gpt", "t5"), settings)
    for preset in ("gpt", "t5"):
        pairs = zip(found[preset].losses, wanted[preset].losses, strict=True)
        assert max(abs(a - b) / b for a, b in pairs) < 2e-3, preset


COMPILED = {
    "one process": (1, {}, {}),
    **{name: LAYOUTS[name] for name in ("tp2", "pp2", "cp2", "fsdp2")},
    "tp2, selectively recomputed": (2, TP2 | {"parallel.recompute": "selective"}, DEEPER),
    "pp2, recomputed": (2, PP2 | {"parallel.recompute": "full"}, DEEPER),
    "cp2, selectively recomputed": (2, CP2 | {"parallel.recompute": "selective"}, DEEPER),
    "fsdp2, recomputed": (2, FSDP2 | {"parallel.recompute": "full"}, DEEPER),
}


def compiled(raw, presets, given):
    """By the compiler's front alone: what reaches its back is the same program."""
    compile.BACKEND = "aot_eager"
    try:
        return runs.run(raw, presets, given | {"training.compile": True})
    finally:
        compile.BACKEND = "inductor"


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layouts_equal_one_process(name, pool, raw, single):
    ranks, given, deeper = COMPILED[name]
    settings = deeper | {"training.global_batch_size": 4}
    found = runs.merge(pool.run(ranks, compiled, raw, ["gpt", "t5"], settings | given))
    wanted = single(("gpt", "t5"), settings)
    for preset in ("gpt", "t5"):
        runs.compare(found[preset], wanted[preset], f"{preset} {name}", 1e-5)
