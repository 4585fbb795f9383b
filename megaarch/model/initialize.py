"""Deterministic initialization: a parameter's values depend on the seed and its name alone.

Each parameter is drawn whole, on the CPU, from a generator of its own, so that the order of
modules, the device and the layout change nothing.
"""

import hashlib
import re

import torch

from megaarch import settings
from megaarch.model.transformer import Transformer, stacks

_LAYER = re.compile(r"layers\.(\d+)\.")


def initial_value(
    name: str, shape: tuple[int, ...], model: settings.Model, seed: int
) -> torch.Tensor:
    """fp32 CPU tensor for the parameter of this global name and full shape.

    Norms are one, biases zero, all else normal(0, initial_deviation); the projections that end a
    residual branch are scaled by 1/sqrt(2·layers of the stack) (Radford et al. 2019, section 2.3).
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm." in name:
        return torch.ones(shape)
    deviation = model.initial_deviation
    layer = _LAYER.match(name)
    if layer and name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        layers = next(s.layers for s in stacks(model) if int(layer[1]) in s.layers)
        deviation *= (2 * len(layers)) ** -0.5
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator) * deviation


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Sets every parameter of an unsharded model. After building on `meta`, call
    `model.to_empty(device=...)` first."""
    for name, parameter in model.named_parameters():
        value = initial_value(name, tuple(parameter.shape), model.settings, seed)
        parameter.copy_(value)
