"""The attention matrices of a model, layer by layer and head by head, under its own mask or another.

Letters of shapes: docs/shapes.md.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from megaarch.attention.kernel_interface import AttentionInputs
from megaarch.attention.mask import CAUSAL, FULL, UNUSED, Parts
from megaarch.attention.reference import heads, scores, visible, weights
from megaarch.model.layers import CrossAttention, Layer, SelfAttention
from megaarch.model.transformer import Transformer


def same(parts: Parts) -> Parts:
    """Returns the mask that a model has."""
    return parts


def causal_mask(parts: Parts) -> Parts:
    """Returns the causal mask of the same rows: no query sees a key that comes after it."""
    table = parts.table.copy()
    table[..., 0][table[..., 0] != UNUSED] = CAUSAL
    return Parts(table, parts.queries, parts.keys)


def full_mask(parts: Parts) -> Parts:
    """Returns the mask under which every query of a row sees every key that one of the row's queries
    sees. For rows of one example each."""
    table = parts.table.copy()
    used = table[..., 0] != UNUSED
    table[..., 0][used] = FULL
    table[..., 3][used] = 0
    table[..., 4] = np.where(used, key_counts(parts)[:, None], 0)
    return Parts(table, parts.queries, parts.keys)


def key_counts(parts: Parts) -> np.ndarray:
    """Returns how many slots of each row are keys, int [B]: all of an example but XLNet's query tokens."""
    return parts.table[..., 4].max(axis=1)


@contextmanager
def recorded_attention(
    model: Transformer, mask: Callable[[Parts], Parts] = same
) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Yields the weights of each module of attention, fp64 [B, H, Sq, Sk], which a forward pass fills in. mask: of
    self-attention, from the model's own.

    Attention is dense meanwhile.
    """
    found, by = {}, {}
    for layer in cast(list[Layer], list(model.layers.values())):
        by[layer.attention] = partial(_attend, found, layer.attention, mask)
        if layer.cross_attention is not None:
            by[layer.cross_attention] = partial(_attend, found, layer.cross_attention, same)
    with attending(by):
        yield found


@contextmanager
def attending(
    by: Mapping[SelfAttention | CrossAttention, Callable[..., torch.Tensor]],
) -> Iterator[None]:
    """Has modules attend by other functions, and by their own again afterwards."""
    own = {module: module.attend for module in by}
    try:
        for module, attend in by.items():
            module.attend = attend
        yield
    finally:
        for module, attend in own.items():
            module.attend = attend


def _attend(
    found: dict[nn.Module, torch.Tensor],
    module: nn.Module,
    mask: Callable[[Parts], Parts],
    *given: Any,
    **options: Any,
) -> torch.Tensor:
    inputs = inputs_of(*given, **options)
    inputs = replace(inputs, parts=mask(inputs.parts))
    seen = visible(inputs)
    found[module] = weights(scores(inputs, seen), seen)
    out = found[module] @ heads(inputs.v, seen, inputs.q.shape[2])
    return out.transpose(1, 2).to(inputs.q.dtype)


def inputs_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parts: Parts,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    **options: Any,
) -> AttentionInputs:
    """Returns the inputs that `attend` makes of its arguments."""
    return AttentionInputs(
        q, k, v, parts, q.shape[-1] ** -0.5 if scale is None else scale, **options
    )
