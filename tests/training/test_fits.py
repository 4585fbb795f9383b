"""The memory that a model needs at least, told ahead of building it."""

import math

import pytest
import torch

from megaarch import catalogue
from megaarch.model import Transformer
from megaarch.training import fits
from tests.conftest import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_built_model(preset, tiny):
    settings = tiny(preset, model__layers=5)
    axes = catalogue.position_axes(settings.data.objective)
    built = Transformer(settings.model, position_axes=axes)
    counted = sum(math.prod(p.shape) for p in built.parameters())
    assert fits.parameters(settings.model, axes) == counted
    assert fits.least_bytes(settings) == 16 * counted
    split = {"parallel__data_parallel_shard": 2, "training__optimizer": "sgd"}
    assert fits.least_bytes(tiny(preset, model__layers=5, **split)) == 4 * counted


def test_stacks_of_two_depths_are_counted(tiny):
    settings = tiny("t5", model__encoder_layers=4, model__decoder_layers=3)
    built = Transformer(settings.model, position_axes=1)
    assert fits.parameters(settings.model, 1) == sum(p.numel() for p in built.parameters())


def test_a_model_that_no_machine_holds_is_refused_in_words(tiny, monkeypatch):
    settings = tiny(model__layers=2000, model__hidden_size=65536)
    with pytest.raises(ValueError, match=r"this model needs [\d.,]+ TB a process .*cpu has"):
        fits.check(settings, torch.device("cpu"))
    small = tiny()
    fits.check(small, torch.device("cpu"))
    monkeypatch.setattr(fits, "memory_of", lambda device: fits.least_bytes(small) - 1)
    with pytest.raises(ValueError, match="spread it over more processes"):
        fits.check(small, torch.device("cpu"))


def test_sizes_in_words():
    assert [fits.in_words(x) for x in (5, 3.2e12, 1e21)] == ["5.0 bytes", "3.2 TB", "1,000.0 EB"]
