"""Sharded, hybrid and replicated data parallelism equal one process."""

from unittest.mock import patch

import pytest
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from megaarch.config.schema import Parallel
from tests.conftest import PRESETS
from tests.distributed import runs
from tests.distributed.layouts import DEEPER, FACTORED
from tests.steps import forward_backward

LAYOUTS = {
    "fsdp2": {"parallel.data_parallel_shard": 2},
    "fsdp2 no reshard": {
        "parallel.data_parallel_shard": 2,
        "parallel.reshard_after_forward": False,
    },
    "hsdp": {"parallel.data_parallel_shard": 2, "parallel.data_parallel_replicate": 2},
    "replicated": {"parallel.data_parallel_replicate": 2},
}
SOME = ("t5", "glm", "xlnet")  # what the variants run; all presets run fsdp2
RANKS = {"fsdp2": 2, "fsdp2 no reshard": 2, "hsdp": 4, "replicated": 2}


@pytest.fixture(scope="module")
def single(raw, prepared):
    """Runs of one process."""
    return runs.run(raw, list(PRESETS), {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_one_process(layout, pool, raw, single):
    presets = list(PRESETS if layout == "fsdp2" else SOME)
    found = runs.merge(pool.run(RANKS[layout], runs.run, raw, presets, LAYOUTS[layout]))
    for preset in presets:
        runs.compare(found[preset], single[preset], f"{preset} {layout}", 1e-5)


def test_fp64_equals_one_process_to_rounding(pool, raw, prepared):
    wanted = runs.run(raw, ["t5"], {}, "fp64")
    found = runs.merge(pool.run(4, runs.run, raw, ["t5"], LAYOUTS["hsdp"], "fp64"))
    runs.compare(found["t5"], wanted["t5"], "t5", 1e-10, weights=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_options_equal_one_process(optimizer, pool, raw, prepared):
    """Clipping, z-loss, dropout, an output of its own."""
    given = {
        "training.optimizer": optimizer,
        "training.clip_gradient": 0.05,
        "training.z_loss": 1e-3,
        "model.dropout": 0.1,
        "model.tied_embedding": False,
    }
    wanted = runs.run(raw, ["bert"], given)
    found = runs.merge(pool.run(2, runs.run, raw, ["bert"], given | LAYOUTS["fsdp2"]))
    runs.compare(found["bert"], wanted["bert"], "options", 1e-5)


def shards(raw, given):
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    sizes = {n: p.to_local().numel() for n, p in trainer.model.named_parameters()}
    layers = [isinstance(layer, FSDPModule) for layer in trainer.model.layers.values()]
    out = trainer.model(trainer.steps[0][0])
    return sizes, layers, str(out.nll.dtype), gathered(trainer)


def gathered(trainer):
    kinds = set()
    layer = trainer.model.layers["0"]
    hook = layer.attention.register_forward_pre_hook(
        lambda module, _: kinds.add(str(module.qkv.weight.dtype))
    )
    trainer.step(trainer.steps[0])
    hook.remove()
    return kinds, {str(p.dtype) for p in trainer.model.parameters()}


def test_parameters_are_sharded_and_computed_in_half_precision(pool, raw, prepared):
    given = LAYOUTS["fsdp2"] | {"training.precision": "bf16"}
    ranks = pool.run(2, shards, raw, given)
    whole = {
        n: p.numel()
        for n, p in runs.trainer_of(runs.settings_of(raw, "gpt", {})).model.named_parameters()
    }
    for name, size in whole.items():
        assert sum(sizes[name] for sizes, *_ in ranks) == size, name
    sizes, layers, losses, (computed, kept) = ranks[0]
    assert sum(sizes.values()) < 0.6 * sum(whole.values())
    assert all(layers) and losses == "torch.float32"
    assert computed == {"torch.bfloat16"} and kept == {"torch.float32"}


def unequal_weights(raw, given):
    """All targets on rank 0's rows: a mean of means would halve nothing and double the rest."""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    batches = trainer.steps[0]
    ours = trainer.grid.data_ranks == 1
    for number, batch in enumerate(batches):
        if trainer.grid.data_rank > 0 or (ours and number > 0):
            batch.target_weights.zero_()
            batch.head_rows.zero_()
    loss = float(forward_backward(trainer, batches))
    return loss, {n: runs.whole(p.grad) for n, p in trainer.model.named_parameters()}


def test_the_loss_is_divided_by_the_weight_of_all_ranks(pool, raw, prepared):
    given = {"training.micro_batch_size": 4}
    loss, wanted = unequal_weights(raw, given)
    for found, gradients in pool.run(2, unequal_weights, raw, given | LAYOUTS["fsdp2"]):
        assert found == pytest.approx(loss, rel=1e-6)
        for name, value in wanted.items():
            assert runs.distance(gradients[name], value) < 1e-5, name


def left_gathered(raw, given):
    """Names of the layers whose parameters are whole after a forward pass."""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", DEEPER | given))
    trainer.model(trainer.steps[0][0])
    return [
        n
        for n, x in trainer.model.layers.items()
        if not hasattr(x.attention_norm.weight, "placements")
    ]


@pytest.mark.parametrize(
    ("layout", "wanted"), [("fsdp2", ["2"]), ("fsdp2 no reshard", ["0", "1", "2"])]
)
def test_the_layer_that_the_backward_pass_begins_with_stays_gathered(layout, wanted, pool, raw):
    assert pool.run(2, left_gathered, raw, LAYOUTS[layout]) == [wanted] * 2


@pytest.mark.parametrize(
    ("given", "again"),
    [
        ({"data_parallel_shard": 2}, True),
        ({"data_parallel_shard": 2, "pipeline_parallel": 2}, False),
        ({"data_parallel_shard": 2, "pipeline_parallel": 2, "reshard_after_forward": True}, True),
        ({"context_parallel": 2, "reshard_after_forward": False}, False),
        ({"data_parallel_replicate": 2}, False),
    ],
)
def test_a_pipeline_gathers_parameters_once(given, again):
    assert Parallel(**given).gathers_again == again


def all_reduces(raw, count):
    """How many all-reduces a step of so many micro-batches makes."""
    given = DEEPER | LAYOUTS["hsdp"] | {"training.global_batch_size": 4 * count}
    trainer = runs.trainer_of(runs.settings_of(raw, "t5", given | {"training.micro_batch_size": 1}))
    batches = trainer.steps[0]
    assert len(batches) == count
    with patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as called:
        forward_backward(trainer, batches)
    return called.call_count


def test_gradients_are_summed_over_copies_once_a_step(pool, raw, prepared):
    (one, *_), (four, *_) = (pool.run(4, all_reduces, raw, count) for count in (1, 4))
    assert one > 3, "each layer's, and those of what is outside of layers"
    assert four == one


def all_reduces_of_adafactor(raw):
    """How many all-reduces Adafactor's step makes of sharded parameters, and how many parameters it has."""
    given = LAYOUTS["fsdp2"] | FACTORED | {"training.optimizer": "adafactor"}
    trainer = runs.trainer_of(runs.settings_of(raw, "t5", given))
    forward_backward(trainer, trainer.steps[0])
    with patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as called:
        trainer.optimizer.step()
    return called.call_count, len(list(trainer.model.parameters()))


def test_adafactor_sums_for_all_parameters_at_once(pool, raw, prepared):
    """Means of columns, and roots of mean squares: rows are what FSDP splits."""
    for messages, parameters in pool.run(2, all_reduces_of_adafactor, raw):
        assert messages == 2 < parameters
