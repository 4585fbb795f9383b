"""Parameter counts of a model that is built but never allocated."""

import math
from typing import Any

import torch

from megaarch.config.cached import cached
from megaarch.config.schema import Model
from megaarch.model.transformer import Transformer, stacks


def parameter_count(model: Model, position_axes: int = 1) -> int:
    """Returns the number of parameters, a tied embedding counted once."""
    return sum(parameter_sizes(model, position_axes).values())


def non_embedding_parameter_count(model: Model, position_axes: int = 1) -> int:
    """Returns that without the tables: token, position and segment embeddings, and the output."""
    tables = ("embedding.", "positions.", "segments.", "output.")
    return sum(
        size
        for name, size in parameter_sizes(model, position_axes).items()
        if not name.startswith(tables)
    )


def parameter_sizes(model: Model, position_axes: int = 1) -> dict[str, int]:
    """Maps each parameter's global name to its number of elements."""
    shapes = parameter_shapes(model, position_axes)
    return {name: math.prod(shape) for name, shape in shapes.items()}


@cached(256)
def parameter_shapes(model: Model, position_axes: int) -> dict[str, tuple[int, ...]]:
    """Maps each parameter's global name to its shape. The layers of a stack are alike, so only one of
    each is built: a model of thousands takes long."""
    one: dict[str, Any] = dict.fromkeys(("layers", "encoder_layers", "decoder_layers"), 1)
    with torch.device("meta"):
        built = Transformer(model.model_copy(update=one), position_axes=position_axes)
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name in [name for name in shapes if name.startswith("layers.")]:
        _, index, rest = name.split(".", 2)
        layers.setdefault(int(index), {})[rest] = shapes.pop(name)
    for first, stack in enumerate(stacks(model)):
        for index in stack.layers:
            shapes |= {f"layers.{index}.{rest}": shape for rest, shape in layers[first].items()}
    return shapes
