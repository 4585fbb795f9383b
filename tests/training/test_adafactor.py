"""Adafactor against its definition, written here a second time in NumPy, for each projection by itself."""

import numpy as np
import pytest
import torch
from torch import nn

from megaarch.config.schema import Training
from megaarch.model import Transformer, initialize
from megaarch.training import optimizer
from tests.model.conftest import tiny

RATE = 0.01


class Definition:
    """Shazeer and Stern 2018, algorithms 4 and 5, with T5X's additions: the steps follow the parameter's
    RMS, and what has a side below 128 is not factored."""

    def __init__(self, weight):
        self.weight, self.steps, self.kept = weight.copy(), 0, {}

    def mean(self, name, value, share):
        self.kept[name] = share * self.kept.get(name, 0.0) + (1 - share) * value
        return self.kept[name]

    def step(self, grad, rate):
        self.steps += 1
        share = 1 - self.steps**-0.8
        square = grad**2 + 1e-30
        if grad.ndim == 2 and min(grad.shape) >= 128:
            rows = self.mean("rows", square.mean(1), share)
            columns = self.mean("columns", square.mean(0), share)
            second = np.outer(rows, columns) / rows.mean()
        else:
            second = self.mean("all", square, share)
        update = grad / np.sqrt(second)
        update = update / max(1.0, np.sqrt((update**2).mean()))
        scale = max(1e-3, np.sqrt((self.weight**2).mean()))
        self.weight = self.weight - rate * scale * update


def unfused(name, value, settings):
    """The projections of one of our parameters, each [outputs, inputs] or [outputs]."""
    keys, size = settings.kv_heads or settings.heads, settings.head_size
    if ".attention.qkv." in name:
        group = settings.heads // keys
        heads = value.reshape(keys, group + 2, size, *value.shape[1:])
        parts = heads[:, :group], heads[:, group], heads[:, group + 1]
    elif ".cross_attention.kv." in name:
        heads = value.reshape(keys, 2, size, *value.shape[1:])
        parts = heads[:, 0], heads[:, 1]
    elif ".gate_up." in name:
        parts = value[0::2], value[1::2]
    else:
        parts = (value,)
    return [part.reshape(-1, *value.shape[1:]) for part in parts]


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_five_steps_equal_the_definition(kv_heads):
    settings = tiny(
        architecture="encoder_decoder",
        hidden_size=136,
        heads=4,
        kv_heads=kv_heads,
        head_size=64,
        feed_forward_size=130,
        position_encoding="relative",
        normalization="layernorm",
        bias=True,
    )
    model = Transformer(settings).double()
    initialize(model, 3)
    training = Training(optimizer="adafactor", learning_rate=RATE, weight_decay=0.0)
    built = optimizer.build(model, training)
    wanted = {
        name: [Definition(part) for part in unfused(name, p.detach().numpy(), settings)]
        for name, p in model.named_parameters()
    }
    rng = np.random.default_rng(0)
    for _ in range(5):
        for name, p in model.named_parameters():
            scale = 10.0 ** rng.uniform(-4, 1)
            grad = rng.normal(0, scale, p.shape) * rng.uniform(0.1, 1, p.shape[-1])
            p.grad = torch.from_numpy(grad)
            for definition, part in zip(wanted[name], unfused(name, grad, settings), strict=True):
                definition.step(part, RATE)
        built.step()
    for name, p in model.named_parameters():
        found = unfused(name, p.detach().numpy(), settings)
        for definition, part in zip(wanted[name], found, strict=True):
            np.testing.assert_allclose(part, definition.weight, rtol=1e-9, atol=1e-12, err_msg=name)
    factored = {name for name, p in model.named_parameters() if "row_var" in built.state[p]}
    assert (
        "layers.0.attention.qkv.weight" in factored
        and "layers.0.attention.qkv.bias" not in factored
    )


def test_a_parameter_without_gradients_stays_finite():
    """Rows of padded ids have none, nor has a whole table that no batch used."""
    layer = nn.Linear(128, 256, bias=False).double()
    before = layer.weight.detach().clone()
    built = optimizer.build(layer, Training(optimizer="adafactor", weight_decay=0.0))
    for used in (0, 100):
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[:used] = 1.0
        built.step()
    assert torch.equal(layer.weight[100:], before[100:])
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight[:100], before[:100])


def test_weight_decay_is_times_the_rate_and_of_matrices_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = [p.detach().clone() for p in model.parameters()]
    built = optimizer.build(
        model, Training(optimizer="adafactor", learning_rate=0.5, weight_decay=0.1)
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    built.step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (0.95 if p.ndim > 1 else 1.0))
