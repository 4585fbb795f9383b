"""Parameter counts of a model that is built but never allocated."""

import math
from functools import lru_cache

import torch

from megaarch.model.transformer import Transformer
from megaarch.settings import Model


def parameter_count(model: Model, position_axes: int = 1) -> int:
    """Parameters, a tied embedding counted once."""
    return sum(parameter_sizes(model, position_axes).values())


def non_embedding_parameter_count(model: Model, position_axes: int = 1) -> int:
    """Parameters without the tables: token, position and segment embeddings, and the output."""
    tables = ("embedding.", "positions.", "segments.", "output.")
    return sum(
        size
        for name, size in parameter_sizes(model, position_axes).items()
        if not name.startswith(tables)
    )


def parameter_sizes(model: Model, position_axes: int = 1) -> dict[str, int]:
    """Of each parameter by its global name."""
    shapes = parameter_shapes(model, position_axes)
    return {name: math.prod(shape) for name, shape in shapes.items()}


@lru_cache(maxsize=256)
def parameter_shapes(model: Model, position_axes: int) -> dict[str, tuple[int, ...]]:
    """Of each parameter by its global name."""
    with torch.device("meta"):
        built = Transformer(model, position_axes=position_axes)
    return {name: tuple(p.shape) for name, p in built.named_parameters()}
