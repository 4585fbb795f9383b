"""Deterministic initialization: a parameter's values depend on the seed and its name alone.

Each parameter is drawn on the CPU in blocks, each from a generator of its own, so that the order of
modules, the device and the layout change nothing, and a shard is drawn without the rest.
"""

import hashlib
import math
import re
from collections.abc import Callable
from functools import lru_cache

import torch

from megaarch.config import schema
from megaarch.config.matmuls import head_size
from megaarch.model.fused_projections import projections
from megaarch.model.transformer import Transformer, stacks

BLOCK = 2**20  # elements of a parameter, flattened, that one generator draws
_LAYER = re.compile(r"layers\.(\d+)\.")
Draw = Callable[[int, torch.Generator], torch.Tensor]  # so many values of deviation 1


def initial_value(
    name: str,
    shape: tuple[int, ...],
    model: schema.Model,
    seed: int,
    shard: tuple[range, ...] | None = None,
) -> torch.Tensor:
    """Returns the fp32 CPU tensor of the parameter of this global name and full shape.

    Norms are one, biases zero, all else by `model.initializer`: `_gpt2` or `_t5x`.
    shard: the indices along each axis to return, None: all. The result equals that slice of the whole,
    bit for bit; only the blocks that it touches are drawn.
    """
    shard = tuple(range(size) for size in shape) if shard is None else shard
    sizes = tuple(len(indices) for indices in shard)
    if name.endswith("bias"):
        return torch.zeros(sizes)
    if "norm." in name:
        return torch.ones(sizes)
    scheme = _t5x if model.initializer == "t5x" else _gpt2
    draw, deviation = scheme(name, shape, model, shard[0])
    return _drawn(draw, name, shape, seed, shard).mul_(deviation)


def _gpt2(
    name: str, shape: tuple[int, ...], model: schema.Model, rows: range
) -> tuple[Draw, float]:
    """normal(0, initial_deviation); the projections that end a residual branch are scaled by
    1/sqrt(2·layers of the stack) (Radford et al. 2019, section 2.3)."""
    deviation = model.initial_deviation
    layer = _LAYER.match(name)
    if layer and name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        layers = next(s.layers for s in stacks(model) if int(layer[1]) in s.layers)
        deviation *= (2 * len(layers)) ** -0.5
    return _normal, deviation


def _t5x(
    name: str, shape: tuple[int, ...], model: schema.Model, rows: range
) -> tuple[Draw, float | torch.Tensor]:
    """T5X's (Roberts et al. 2022; t5x/examples/t5/layers.py, network.py): token embedding of deviation 1;
    dense weights of variance 1/inputs, normal in attention and truncated normal elsewhere; queries
    divided by sqrt(head size) besides; relative bias uniform, of variance 1/(mean of both sizes). Other
    tables have their default for embeddings, variance 1/width."""
    if name == "embedding.weight":
        return _normal, 1.0
    if name.startswith("relative_bias."):
        return _uniform, (sum(shape) / 2) ** -0.5
    deviation = shape[1] ** -0.5
    if "attention." not in name:
        table = name.startswith(("positions.", "segments."))
        return _normal if table else _truncated_normal, deviation
    kinds = projections(name, model)
    of_query = torch.tensor([kind == "query" for kind in kinds.names])[kinds.of_rows(rows)]
    divisor = torch.where(of_query, head_size(model) ** 0.5, 1.0)
    return _normal, deviation / divisor[:, None]


def _normal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator)


def _truncated_normal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A normal cut off at two of its deviations, by its inverse distribution function, scaled back to
    deviation 1 (as jax.nn.initializers.variance_scaling)."""
    end = math.erf(2**0.5)
    density = math.exp(-2) / math.sqrt(2 * math.pi)  # of the normal, at the ends
    uniform = torch.rand(size, generator=generator).mul_(2 * end).sub_(end)
    return uniform.erfinv_().mul_((2 / (1 - 4 * density / end)) ** 0.5)


def _uniform(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(size, generator=generator).mul_(2).sub_(1).mul_(3**0.5)


def _drawn(
    draw: Draw, name: str, shape: tuple[int, ...], seed: int, shard: tuple[range, ...]
) -> torch.Tensor:
    """Returns a shard of the values of a parameter, of deviation 1."""
    elements = math.prod(shape)

    @lru_cache(maxsize=1)  # the next span often begins in the last block
    def block(number: int) -> torch.Tensor:
        text = f"{seed} {name}" if number == 0 else f"{seed} {name} {number}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return draw(min(BLOCK, elements - number * BLOCK), generator)

    value = torch.empty([len(indices) for indices in shard])
    if not value.numel():
        return value
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    rows = max(1, BLOCK // strides[0])  # as many as one block has, so that little is held at once
    for part, start in zip(value.split(rows), shard[0][::rows], strict=True):
        ends = [(start, start + len(part) - 1), *((r[0], r[-1]) for r in shard[1:])]
        first, last = (sum(map(math.prod, zip(index, strides))) for index in zip(*ends))
        numbers = range(first // BLOCK, last // BLOCK + 1)
        span = torch.cat(
            [block(n)[max(first - n * BLOCK, 0) : last + 1 - n * BLOCK] for n in numbers]
        )
        part.copy_(span.as_strided(part.shape, strides))
    return value


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Sets every parameter of an unsharded model. After building on `meta`, call
    `model.to_empty(device=...)` first."""
    for name, parameter in model.named_parameters():
        value = initial_value(name, tuple(parameter.shape), model.settings, seed)
        parameter.copy_(value)
