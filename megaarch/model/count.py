"""Parameter counts of a model that is built but never allocated."""

from functools import lru_cache

import torch

from megaarch.model.transformer import Transformer
from megaarch.settings import Model


def parameter_count(model: Model, position_axes: int = 1) -> int:
    """Parameters, a tied embedding counted once."""
    return sum(_sizes(model, position_axes).values())


def non_embedding_parameter_count(model: Model, position_axes: int = 1) -> int:
    """Parameters without the tables: token, position and segment embeddings, and the output."""
    tables = ("embedding.", "positions.", "segments.", "output.")
    return sum(
        size for name, size in _sizes(model, position_axes).items() if not name.startswith(tables)
    )


@lru_cache(maxsize=256)
def _sizes(model: Model, position_axes: int) -> dict[str, int]:
    with torch.device("meta"):
        built = Transformer(model, position_axes=position_axes)
    return {name: p.numel() for name, p in built.named_parameters()}
