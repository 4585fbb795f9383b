"""The memory that a model needs at least, told before building it."""

import math

import pytest
import torch

from megaarch.config import catalogue
from megaarch.model import Transformer
from megaarch.model.parameter_count import parameter_count, parameter_shapes
from megaarch.training import memory_check
from tests.conftest import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_built_model(preset, tiny):
    settings = tiny(preset, model__layers=5)
    axes = catalogue.position_axes(settings.data.objective)
    built = Transformer(settings.model, position_axes=axes)
    counted = sum(math.prod(p.shape) for p in built.parameters())
    assert parameter_count(settings.model, axes) == counted
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert parameter_shapes(settings.model, axes) == shapes
    assert memory_check.least_bytes(settings) == 16 * counted
    split = {"parallel__data_parallel_shard": 2, "training__optimizer": "sgd"}
    assert memory_check.least_bytes(tiny(preset, model__layers=5, **split)) == 4 * counted


def test_stacks_of_two_depths_are_counted(tiny):
    settings = tiny("t5", model__encoder_layers=4, model__decoder_layers=3)
    built = Transformer(settings.model, position_axes=1)
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert parameter_shapes(settings.model, 1) == shapes


def test_a_model_that_no_machine_holds_is_refused_in_words(tiny, monkeypatch):
    settings = tiny(model__layers=1000, model__hidden_size=65536)
    with pytest.raises(ValueError, match=r"this model needs [\d.,]+ TB a process .*cpu has"):
        memory_check.check(settings, torch.device("cpu"))
    small = tiny()
    memory_check.check(small, torch.device("cpu"))
    monkeypatch.setattr(
        memory_check, "memory_of", lambda device: memory_check.least_bytes(small) - 1
    )
    with pytest.raises(ValueError, match="spread it over more processes"):
        memory_check.check(small, torch.device("cpu"))


@pytest.mark.parametrize(
    "axis, share",
    [
        ("tensor_parallel", 2),
        ("pipeline_parallel", 2),
        ("context_parallel", 2),
        ("data_parallel_shard", 2),
        ("data_parallel_replicate", 1),
    ],
)
def test_every_axis_that_divides_parameters_divides_the_least(axis, share, tiny):
    """FSDP divides them over context-parallel ranks as well: what fits there must not be refused."""
    divided = tiny(**{f"parallel__{axis}": 2})
    assert memory_check.least_bytes(divided) == memory_check.least_bytes(tiny()) / share


def test_sizes_in_words():
    assert [memory_check.in_words(x) for x in (5, 3.2e12, 1e21)] == [
        "5.0 bytes",
        "3.2 TB",
        "1,000.0 EB",
    ]


def test_the_inputs_of_the_layers_count(tiny, monkeypatch):
    """A micro-batch keeps rows of 48 tokens of 32 numbers before each of two layers."""
    rows = {"training__micro_batch_size": 4096, "training__global_batch_size": 4096}
    settings = tiny(**rows)
    assert memory_check.activation_bytes(settings) == 4096 * 48 * 32 * 2 * 4
    half = tiny(**rows, parallel__pipeline_parallel=2, training__precision="bf16")
    assert memory_check.activation_bytes(half) == 4096 * 48 * 32 * 2
    two = tiny("t5", model__target_length=16)
    assert memory_check.activation_bytes(two) == 4 * (48 + 16) * 32 * 2 * 4
    monkeypatch.setattr(
        memory_check, "memory_of", lambda device: memory_check.least_bytes(settings) + 1
    )
    with pytest.raises(ValueError, match="the layers' inputs.*lower .*micro_batch_size"):
        memory_check.check(settings, torch.device("cpu"))
