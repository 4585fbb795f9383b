"""Parts as one interval of keys for each query row, for kernels that take a mask as a rule.

A row of a full part sees all of the part's keys, a row of a causal part sees them up to its
diagonal: in either case keys first <= j < last. A row that sees no key has first = last = 0.

Shape suffixes: B rows, S length (queries or keys), N blocks.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megaarch.attention.parts import FULL, Parts
from megaarch.attention.rows import to_device
from megaarch.attention.sdpa_plan import visible_tiles


@dataclass(frozen=True)
class Intervals:
    """first, last: int32 [B, Sq]. unasked, unseen: bool [B, S], queries that see no key and keys
    that no query sees, or None where there are none. on_device: tensors, by device; never
    pickled."""

    first: np.ndarray
    last: np.ndarray
    unasked: np.ndarray | None
    unseen: np.ndarray | None
    on_device: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"on_device": {}}


def intervals(parts: Parts) -> Intervals:
    """The intervals of these parts, remembered on them."""
    return parts.plan("intervals", _build)


def _build(parts: Parts) -> Intervals:
    first = np.zeros((len(parts), parts.queries), dtype=np.int32)
    last = np.zeros_like(first)
    seen = np.zeros((len(parts), parts.keys), dtype=bool)
    for shape, row, q0, q1, k0, k1, _ in visible_tiles(parts):
        first[row, q0:q1] = k0
        last[row, q0:q1] = k1 if shape == FULL else np.arange(k1 - (q1 - q0), k1) + 1
        seen[row, k0:k1] = True
    unasked, unseen = last == 0, ~seen
    return Intervals(
        first, last, unasked if unasked.any() else None, unseen if unseen.any() else None
    )


def tensors(found: Intervals, device: torch.device) -> dict[str, torch.Tensor | None]:
    """The arrays on a device, made once."""
    if device not in found.on_device:
        names = ("first", "last", "unasked", "unseen")
        found.on_device[device] = {n: to_device(getattr(found, n), device) for n in names}
    return found.on_device[device]


def blank(x_BSHD: torch.Tensor, rows_BS: torch.Tensor | None) -> torch.Tensor:
    """x with zeros in these rows, which then reach nothing, whatever they hold."""
    return x_BSHD if rows_BS is None else x_BSHD.masked_fill(rows_BS[..., None, None], 0.0)


@dataclass(frozen=True)
class Blocks:
    """Which blocks of keys a block of query rows needs, on the host.

    partial, full: (count int32 [B, 1, N], index int32 [B, 1, N, M]) of blocks that the rule must
    be applied to, and of those that it leaves whole; indices in use come first.
    """

    partial: tuple[np.ndarray, np.ndarray]
    full: tuple[np.ndarray, np.ndarray]
    size: tuple[int, int]


def blocks(parts: Parts, size: tuple[int, int] = (128, 128)) -> Blocks:
    """The blocks of these parts, remembered on them. size: query rows and keys of a block."""
    return parts.plan(f"blocks:{size}", lambda p: _build_blocks(intervals(p), p, size))


def _build_blocks(found: Intervals, parts: Parts, size: tuple[int, int]) -> Blocks:
    q, k = size
    starts = np.arange(0, parts.keys, k)
    ends = np.minimum(starts + k, parts.keys)
    rows = np.arange(len(parts))[:, None] * parts.queries
    edges = (rows + np.arange(0, parts.queries, q)).ravel()
    # Pieces of blocks that lie in one part: their rows share their first key, so that together
    # they see one interval, up to the longest row's end.
    tiles = np.array([tile[1:4] for tile in visible_tiles(parts)], dtype=np.int64).reshape(-1, 3)
    bounds = tiles[:, :1] * parts.queries + tiles[:, 1:]
    cuts = np.unique(np.concatenate((edges, bounds.ravel())))
    cuts = cuts[cuts < found.last.size]
    first = found.first.ravel()[cuts][:, None]
    shortest, longest = (
        reduce.reduceat(found.last.ravel(), cuts)[:, None] for reduce in (np.minimum, np.maximum)
    )
    block = np.searchsorted(cuts, edges)
    needs = np.logical_or.reduceat((first < ends) & (longest > starts), block)
    whole = np.logical_and.reduceat((first <= starts) & (shortest >= ends), block)
    shape = (len(parts), -1, len(starts))
    return Blocks(_listed((needs & ~whole).reshape(shape)), _listed(whole.reshape(shape)), size)


def _listed(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    index = np.argsort(~chosen, axis=2, kind="stable").astype(np.int32)
    return chosen.sum(2, dtype=np.int32)[:, None], index[:, None]
