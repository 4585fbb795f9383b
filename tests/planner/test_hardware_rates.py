"""What the rates of a step's parts must obey, whatever the figures of a GPU."""

from dataclasses import replace

import pytest
import torch

from megaarch import config
from megaarch.model import flops
from megaarch.model.transformer import stacks
from megaarch.planner.hardware import gpu
from megaarch.planner.hardware_rates import Rates, exposed
from megaarch.planner.layer_costs import Layers
from megaarch.planner.software_stacks import OURS
from megaarch.planner.time import Cluster, step_seconds
from megaarch.training.utilization import peak_flops

CLUSTER = Cluster(gpu("h100"))


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
        ("b200", "NVIDIA B200"),
    ],
)
def test_plans_and_runs_count_utilization_of_the_same_peak(name, reported, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: reported)
    measured = peak_flops(torch.device("cuda"))
    assert measured == pytest.approx(gpu(name).peak * 1e12, rel=1e-3)


def settings(preset="gpt", **parallel):
    return config.resolve(
        {
            "model": {
                "preset": preset,
                "layers": 4,
                "heads": 8,
                "kv_heads": 4,
                "hidden_size": 1024,
                "feed_forward_size": 2816,
                "sequence_length": 1024,
            },
            "training": {"global_batch_size": 64, "micro_batch_size": 4, "precision": "bf16"},
            "parallel": {"data_parallel_shard": 8} | parallel,
        }
    )


def with_float8(recipe, **parallel):
    found = settings(**parallel)
    return found.model_copy(
        update={"training": found.training.model_copy(update={"float8": recipe})}
    )


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("preset", ["gpt", "t5", "xlnet", "bart"])
def test_layers_have_the_products_that_flops_are_counted_of(preset, tensor):
    found = Layers(settings(preset, tensor_parallel=tensor))
    counts, rows = found.counts, found.settings.training.micro_batch_size
    whole = replace(counts, tokens=tuple(slots * counts.rows for slots in found.slots))
    forward = flops.forward(found.settings.model, whole)
    wanted = (forward.projections + forward.feed_forward) * rows / counts.rows / tensor
    said = sum(
        2 * each.m * each.n * each.k * len(stack.layers)
        for stream, stack in enumerate(stacks(found.settings.model))
        for each in found.layer(stream).products
    )
    assert said == pytest.approx(wanted)


def test_what_runs_beside_is_between_the_longer_of_the_two_and_their_sum():
    for messages, busy in ((0.0, 2.0), (1.0, 2.0), (5.0, 2.0)):
        assert max(messages, busy) <= busy + exposed(messages, busy) <= messages + busy


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_overlapped_messages_take_less_time_and_not_none(recompute):
    given = settings(tensor_parallel=4, data_parallel_shard=2, recompute=recompute)
    open_, hidden = (
        step_seconds(given, CLUSTER, replace(OURS, overlaps_tensor=each)).tensor
        for each in (False, True)
    )
    assert 0 < hidden < open_


def test_compiled_kernels_move_less_and_nothing_else_changes():
    given = settings()
    eager, fused, unsaid = (
        step_seconds(given.model_copy(update={"training": training}), CLUSTER)
        for training in (
            given.training.model_copy(update={"compile": each}) for each in (False, True, None)
        )
    )
    assert unsaid == fused  # what a GPU does where nothing is said
    assert fused.memory_bound < eager.memory_bound and fused.launches < eager.launches
    assert fused.products == eager.products and fused.attention == eager.attention


def test_float8_hastens_the_layers_products_and_costs_their_casts():
    half, tensorwise, rowwise = (
        step_seconds(with_float8(recipe), CLUSTER) for recipe in (None, "tensorwise", "rowwise")
    )
    gain = CLUSTER.constants.float8
    for found in (tensorwise, rowwise):
        assert half.products / gain < found.products < half.products  # the head's stay as they are
        assert (found.attention, found.recompute) == (half.attention, half.recompute)
    assert half.memory_bound < tensorwise.memory_bound < rowwise.memory_bound


def test_tensorwise_weights_are_gathered_in_float8():
    """And tokens among tensor ranks in bf16."""
    split = {"data_parallel_shard": 2, "tensor_parallel": 4}
    found = {
        recipe: step_seconds(with_float8(recipe, **split), CLUSTER)
        for recipe in ("tensorwise", "rowwise")
    }
    assert found["tensorwise"].data < found["rowwise"].data
    assert found["tensorwise"].tensor == found["rowwise"].tensor


def test_a_gather_over_more_ranks_takes_longer_though_each_sends_no_more():
    bytes_alike = [CLUSTER.hops(ranks, ranks) for ranks in (2, 8, 16, 128, 1024)]
    assert bytes_alike == sorted(bytes_alike) and bytes_alike[-1] > 10 * bytes_alike[2]
    assert CLUSTER.tree_hops(128, 1024) < CLUSTER.hops(128, 1024)


def test_a_ring_over_nodes_is_as_fast_as_its_ports_and_no_faster_than_the_node():
    one, four = (CLUSTER.wire(16, ports) for ports in (1, 4))
    assert four == pytest.approx(4 * one)
    assert CLUSTER.wire(16, 1000) == CLUSTER.wire(8)


@pytest.mark.parametrize(("rows", "again"), [(4, 0.0), (16, 0.0), (17, 1 / 17), (64, 0.75)])
def test_logits_are_made_again_whose_slopes_the_loss_does_not_keep(rows, again):
    """2 GiB of them stay: of 65,536 ids in bf16 those of 16 rows of 1,024 tokens, in chunks of 2,048."""
    given = settings()
    given = given.model_copy(
        update={
            "model": given.model.model_copy(update={"vocabulary_size": 65536}),
            "training": given.training.model_copy(
                update={"micro_batch_size": rows, "global_batch_size": 8 * rows}
            ),
        }
    )
    assert Layers(given).logits_again() == pytest.approx(again, abs=0.001)
    (head,) = Rates(CLUSTER, given.parallel, OURS).products(Layers(given).head(), body=False)
    found = step_seconds(given, CLUSTER)
    assert found.recompute == pytest.approx(again * head.product, rel=0.02)


def test_a_layers_last_product_is_not_made_again():
    given = settings(recompute="full")
    whole, stopped = (
        step_seconds(given, CLUSTER, replace(OURS, early_stop=each)).recompute
        for each in (False, True)
    )
    assert 0 < stopped < whole
