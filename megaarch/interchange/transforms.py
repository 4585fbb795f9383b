"""How a megaarch tensor is made of Hugging Face ones, and taken apart again.

A layout works on weights [rows, columns] and on biases [rows] alike. Legend: Hkv key heads,
G = heads / Hkv, Dh head size, F feed-forward width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megaarch.config import schema
from megaarch.config.matmuls import head_size, key_heads
from megaarch.errors import UserError
from megaarch.model.transformer import padded_vocabulary

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Transform:
    """`fuse(parts, model)` makes one of ours of theirs; `split(ours, model)` undoes it exactly.

    Of parts in shapes that are not the model's, `fuse` may raise UserError, or what torch raises.
    """

    fuse: Callable[[Tensors, schema.Model], torch.Tensor]
    split: Callable[[torch.Tensor, schema.Model], Tensors]


def _transpose(x: torch.Tensor) -> torch.Tensor:
    return x.t() if x.ndim == 2 else x


def _by_head(x: torch.Tensor, model: schema.Model) -> torch.Tensor:
    """[heads·Dh, ...] to [Hkv, heads / Hkv, Dh, ...]."""
    return x.unflatten(0, (key_heads(model), -1, head_size(model)))


def _fuse_heads(parts: Tensors, model: schema.Model) -> torch.Tensor:
    """q, k, v (or k, v), each [heads·Dh, ...], to [Hkv·(q ... q k v)·Dh, ...]."""
    return torch.cat([_by_head(part, model) for part in parts], dim=1).flatten(0, 2)


def _split_heads(fused: torch.Tensor, model: schema.Model) -> Tensors:
    by_head = _by_head(fused, model)
    queries = by_head.shape[1] - 2  # none in a fused k, v
    sizes = (queries, 1, 1) if queries else (1, 1)
    return [part.flatten(0, 2) for part in by_head.split(sizes, dim=1)]


def _fuse_vocabulary(parts: Tensors, model: schema.Model) -> torch.Tensor:
    (table,) = parts
    if len(table) != model.vocabulary_size:
        raise UserError(f"it has {len(table)} rows and vocab_size is {model.vocabulary_size}")
    padding = padded_vocabulary(model.vocabulary_size) - len(table)
    return torch.cat((table, table.new_zeros(padding, *table.shape[1:])))


def _split_vocabulary(table: torch.Tensor, model: schema.Model) -> Tensors:
    return [table[: model.vocabulary_size]]


COPY = Transform(lambda parts, _: parts[0], lambda ours, _: [ours])
TRANSPOSED = Transform(lambda parts, _: _transpose(parts[0]), lambda ours, _: [_transpose(ours)])
HEADS = Transform(_fuse_heads, _split_heads)
# GPT-2's c_attn: [columns, (q k v)·rows] in one.
TRANSPOSED_HEADS = Transform(
    lambda parts, model: _fuse_heads(list(_transpose(parts[0]).chunk(3)), model),
    lambda ours, model: [_transpose(torch.cat(_split_heads(ours, model)))],
)
GATED = Transform(
    lambda parts, _: torch.stack(parts, dim=1).flatten(0, 1),
    lambda ours, _: list(ours.unflatten(0, (-1, 2)).unbind(1)),
)
VOCABULARY = Transform(_fuse_vocabulary, _split_vocabulary)
# BART's final_logits_bias: [1, V].
VOCABULARY_ROW = Transform(
    lambda parts, model: _fuse_vocabulary([parts[0][0]], model),
    lambda ours, model: [_split_vocabulary(ours, model)[0][None]],
)
# Of our tensors, whatever the family; any other is copied.
LAYOUTS = {
    **dict.fromkeys(("embedding", "output", "output_bias"), VOCABULARY),
    **dict.fromkeys(("attention.qkv", "cross_attention.kv"), HEADS),
    "feed_forward.gate_up": GATED,
}
