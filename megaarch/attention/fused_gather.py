"""Rows gathered and scattered by kernels of our own (csrc), opt-in by the `rows` of
`model.fused_kernels`.

Segments stand for their rows, so no index of each row exists. Where several calls read a row, its
gradients are added in one pass, in fp32 and in the calls' order: the same bits each time.

Letters of shapes: docs/shapes.md. Flat rows are [B·S, H, Dh].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megaarch.attention.gather import Gather, Segments
from megaarch.kernels.bindings import call, operator


@dataclass(frozen=True)
class Pieces:
    """Flat rows cut into pieces, of which all rows are read by the same segments: the transpose of a
    gather.

    bounds: int64 [pieces + 1]. readers: int32 [pieces + 1], into origin. origin: int64, the row of all
    calls' rows, one call after the other, in which a reader has the piece's first row.
    """

    bounds: Any
    readers: Any
    origin: Any

    @classmethod
    def of(cls, calls: Sequence[Segments], rows: int) -> "Pieces":
        """Cuts at the segments of all calls, which read flat rows 0 to `rows`. Host only."""
        first = np.concatenate([segments.first for segments in calls])
        lengths = np.concatenate([np.diff(x.starts) for x in calls]).astype(np.int64)
        behind = np.cumsum(lengths) - lengths  # where a segment is among all calls' rows
        bounds = np.unique(np.concatenate(([0, rows], first, first + lengths)))
        low, high = np.searchsorted(bounds, first), np.searchsorted(bounds, first + lengths)
        segment = np.repeat(np.arange(len(first)), high - low)
        piece = np.arange(len(segment)) - np.repeat(np.cumsum(high - low) - high, high - low)
        order = np.argsort(piece, kind="stable")
        segment, piece = segment[order], piece[order]
        readers = np.searchsorted(piece, np.arange(len(bounds))).astype(np.int32)
        return cls(bounds, readers, behind[segment] + bounds[piece] - first[segment])


@dataclass(frozen=True)
class FusedGather(Gather):
    """pieces: of each axis, by which gradients and results are added up."""

    pieces: dict[str, Pieces]

    def read(self, x_BSHDh: torch.Tensor, axis: str) -> tuple[torch.Tensor, ...]:
        return tuple(_read(x_BSHDh, getattr(call, axis)) for call in self.calls)

    def add_up(self, given: Sequence[torch.Tensor], axis: str, shape: torch.Size) -> torch.Tensor:
        flat = [x.reshape(-1, *shape[2:]) for x in given]
        pieces, rows = self.pieces[axis], shape[0] * shape[1]
        return add_up(flat, pieces.bounds, pieces.readers, pieces.origin, rows).view(shape)


def _read(x_BSHDh: torch.Tensor, segments: Segments) -> torch.Tensor:
    if segments.whole:
        return x_BSHDh.contiguous()
    return gather(x_BSHDh.flatten(0, 1), segments.first, segments.starts, segments.total)[None]


def _gathered(flat, first_N, starts_N, total):
    return flat.new_empty((total, *flat.shape[1:]))


@operator("rows_take", _gathered)
def gather(
    flat: torch.Tensor, first_N: torch.Tensor, starts_N: torch.Tensor, total: int
) -> torch.Tensor:
    """[T, H, Dh]: segment n is the rows from first[n] on, starts[n + 1] - starts[n] of them."""
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    out = _gathered(flat, first_N, starts_N, total)
    row, head, _ = (stride * flat.itemsize for stride in flat.stride())
    heads, size = flat.shape[1], flat.shape[2] * flat.itemsize
    lengths = (len(first_N), total, heads, size, row, head)
    call("rows_take", flat.device, flat, out, first_N, starts_N, *lengths)
    return out


def _added(calls, bounds, readers, origin, rows):
    return calls[0].new_empty((rows, *calls[0].shape[1:]))


@operator("rows_add", _added)
def add_up(
    calls: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    readers: torch.Tensor,
    origin: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """[B·S, H, Dh]: each row the sum of those that its piece's readers have. calls: one or two."""
    a, *b = (x.contiguous() for x in calls)
    out = _added(calls, bounds, readers, origin, rows)
    where = (out, bounds, readers, origin, len(bounds) - 1)
    width = out[0].numel() if rows else 0
    call("rows_add", a.device, a, len(a), b[0] if b else None, *where, rows, width, a.dtype)
    return out
