"""Attention of random queries and keys, and of none: what a mask and a sharpness give by themselves.

Letters of shapes: docs/shapes.md.
"""

import torch

from megaarch.attention.reference import weights
from megaarch.probes.matrix_rank import row_entropy

HALVINGS = 30  # of the range of the logarithm of the inverse temperature
RANGE = 12.0


def seen(mask: str, length: int) -> torch.Tensor:
    """Returns bool [length, length]: which keys a query sees under the mask "causal" or "full"."""
    every = torch.ones(length, length, dtype=torch.bool)
    return every.tril() if mask == "causal" else every


def random_logits(like: torch.Tensor, head_size: int, generator: torch.Generator) -> torch.Tensor:
    """Returns q k' / sqrt(Dh) of standard normal q and k, fp64 of the shape of `like` [..., n, n]."""
    shape = (2, *like.shape[:-1], head_size)
    q, k = torch.randn(shape, generator=generator, dtype=torch.float64).unbind()
    return q @ k.mT / head_size**0.5


def random_attention(
    like: torch.Tensor, head_size: int, mask: str, generator: torch.Generator
) -> torch.Tensor:
    """Returns attention of random queries and keys under a mask, of the shape of `like` [L, H, n, n]."""
    logits = random_logits(like, head_size, generator)
    return weights(logits, seen(mask, like.shape[-1]).expand_as(logits))


def uniform_attention(mask: str, length: int) -> torch.Tensor:
    """Returns attention to all that a mask shows alike, fp64 [1, 1, length, length]."""
    visible = seen(mask, length).double()
    return (visible / visible.sum(-1, keepdim=True))[None, None]


def matched_attention(
    trained: torch.Tensor, head_size: int, mask: str, generator: torch.Generator
) -> torch.Tensor:
    """Returns random attention under a mask, each matrix as sharp as the one of `trained` [L, H, n, n]: at the
    temperature at which the mean entropy of its rows, relative to the logarithm of their keys, is the same."""
    visible = seen(mask, trained.shape[-1]).expand_as(trained)
    logits = random_logits(trained, head_size, generator)
    wanted = row_entropy(trained).nanmean(-1)
    low, high = torch.full_like(wanted, -RANGE), torch.full_like(wanted, RANGE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        made = weights(logits * middle.exp()[..., None, None], visible)
        blunt = row_entropy(made).nanmean(-1) > wanted
        low, high = torch.where(blunt, middle, low), torch.where(blunt, high, middle)
    return weights(logits * ((low + high) / 2).exp()[..., None, None], visible)
