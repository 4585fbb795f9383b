"""Parts as one interval of keys for each query row, for kernels that take a mask as a rule.

A row of a full part sees all of the part's keys, a row of a causal part sees them up to its
diagonal: in either case keys first <= j < last. A row that sees no key has first = last = 0.

Letters of shapes: docs/shapes.md. A block is a square of queries and keys; N blocks of queries.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megaarch.attention.kernel_interface import AttentionInputs, Kernel
from megaarch.attention.mask import FULL, Parts, visible_tiles
from megaarch.attention.plan import Plan, to_device


@dataclass(frozen=True)
class Intervals(Plan):
    """first, last: int32 [B, Sq]. unasked, unseen: bool [B, S], queries that see no key and keys
    that no query sees, or None where there are none."""

    first: Any
    last: Any
    unasked: Any
    unseen: Any


def intervals(parts: Parts) -> Intervals:
    """Returns the intervals of these parts, remembered on them."""
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


def tensors(found: Intervals, device: torch.device) -> Intervals:
    """Returns the intervals as tensors on a device, made once."""
    return found.once(device, lambda: to_device(found, device))


@dataclass(frozen=True)
class IntervalKernel(Kernel):
    """A kernel that takes a mask as a rule, and runs a batch in one call on the tensors as they are."""

    @abstractmethod
    def run(self, inputs: AttentionInputs, q, k, v) -> torch.Tensor:
        """Returns the library's output [B, Sq, H, Dh] for q, k and v in its dtype."""

    def warm(self, parts: Parts, fused_rows: bool = False) -> None:
        intervals(parts)

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Returns what `attend.attend` promises."""
        found, dtype = intervals(inputs.parts), self.compute_dtype(inputs.q)
        if not found.last.any():
            return inputs.zeros()
        rows = tensors(found, inputs.device)
        q = _zero_rows(inputs.q.to(dtype), rows.unasked)
        k, v = (_zero_rows(x.to(dtype), rows.unseen) for x in (inputs.k, inputs.v))
        with torch.autocast(inputs.device.type, enabled=False):
            out = self.run(inputs, q, k, v)
        return _zero_rows(out, rows.unasked).to(inputs.q.dtype)


def _zero_rows(x_BSHDh: torch.Tensor, rows_BS: torch.Tensor | None) -> torch.Tensor:
    """Returns x with zeros in these rows, which then reach nothing, whatever they hold."""
    return x_BSHDh if rows_BS is None else x_BSHDh.masked_fill(rows_BS[..., None, None], 0.0)


Blocks = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def blocks(parts: Parts, size: tuple[int, int]) -> Blocks:
    """Returns the blocks of keys that each block of queries needs, on the host, remembered on the parts:
    count int32 [B, 1, N] and index int32 [B, 1, N, blocks of keys] of those that the rule must be applied
    to, and the same of those that it leaves whole; indices in use come first. size: query rows and keys of
    a block."""
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
    return *_listed((needs & ~whole).reshape(shape)), *_listed(whole.reshape(shape))


def _listed(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    index = np.argsort(~chosen, axis=2, kind="stable").astype(np.int32)
    return chosen.sum(2, dtype=np.int32)[:, None], index[:, None]
