"""Rows into the calls of a kernel and out again, as attention/rows.py has it: `Take` and `Put`.

Segments stand for their rows, so no index of the rows' number exists. Where several calls read a
row, its gradients are added in one pass, in fp32 and in the calls' order: the same bits each time.

Shape suffixes: B rows, S length, H heads, D head size, T rows of a call, N segments, P pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaarch.attention.rows import Ranges, to_device
from megaarch.kernels.library import call


@dataclass(frozen=True)
class Pieces:
    """Flat rows cut into pieces whose rows the same segments read.

    bounds: int64 [P + 1]. readers: int32 [P + 1], into origin. origin: int64, the row of all calls'
    rows, one call behind the other, in which a reader has the piece's first row.
    """

    bounds: np.ndarray | torch.Tensor
    readers: np.ndarray | torch.Tensor
    origin: np.ndarray | torch.Tensor

    def on(self, device: torch.device) -> "Pieces":
        return Pieces(*(to_device(x, device) for x in vars(self).values()))


def pieces(sides: Sequence[Ranges], rows: int) -> Pieces:
    """Of the segments of all calls, which read flat rows 0 to `rows`. Host only."""
    first = np.concatenate([side.first for side in sides])
    lengths = np.concatenate([np.diff(side.starts) for side in sides]).astype(np.int64)
    behind = np.cumsum(lengths) - lengths  # where a segment is among all calls' rows
    bounds = np.unique(np.concatenate(([0, rows], first, first + lengths)))
    low, high = np.searchsorted(bounds, first), np.searchsorted(bounds, first + lengths)
    segment = np.repeat(np.arange(len(first)), high - low)
    piece = np.arange(len(segment)) - np.repeat(np.cumsum(high - low) - high, high - low)
    order = np.argsort(piece, kind="stable")
    segment, piece = segment[order], piece[order]
    readers = np.searchsorted(piece, np.arange(len(bounds))).astype(np.int32)
    return Pieces(bounds, readers, behind[segment] + bounds[piece] - first[segment])


class Take(torch.autograd.Function):
    """Rows of x for each call, [1, T, H, D], or x itself where a call reads all of its rows."""

    @staticmethod
    def forward(ctx, x_BSHD, sides, cut):
        ctx.set_materialize_grads(False)
        ctx.cut, ctx.shape = cut, x_BSHD.shape
        return tuple(_rows(x_BSHD, side) for side in sides)

    @staticmethod
    def backward(ctx, *grads):
        return _sum(grads, ctx.cut, ctx.shape), None, None


class Put(torch.autograd.Function):
    """The results of the calls as rows of one tensor, zero where no call writes."""

    @staticmethod
    def forward(ctx, sides, cut, shape, *results):
        ctx.set_materialize_grads(False)
        ctx.sides, ctx.shapes = sides, [result.shape for result in results]
        return _sum(results, cut, shape)

    @staticmethod
    def backward(ctx, grad_BSHD):
        if grad_BSHD is None:
            return None, None, None, *(None for _ in ctx.sides)
        grads = (_rows(grad_BSHD, side) for side in ctx.sides)
        return None, None, None, *(g.view(s) for g, s in zip(grads, ctx.shapes, strict=True))


def _rows(x_BSHD: torch.Tensor, side: Ranges) -> torch.Tensor:
    if side.whole:
        return x_BSHD.contiguous()
    return take(x_BSHD.flatten(0, 1), side.first, side.starts, side.total)[None]


def _sum(given: Sequence[torch.Tensor | None], cut: Pieces, shape: torch.Size):
    if all(x is None for x in given):
        return None
    assert all(x is not None for x in given), "every call's result is part of the output"
    flat = [x.reshape(-1, *shape[2:]) for x in given]
    return add(flat, cut.bounds, cut.readers, cut.origin, shape[0] * shape[1]).view(shape)


@torch.library.custom_op("megaarch::rows_take", mutates_args=())
def take(
    x_RHD: torch.Tensor, first_N: torch.Tensor, starts_N: torch.Tensor, total: int
) -> torch.Tensor:
    """[T, H, D]: segment n is the rows from first[n] on, starts[n + 1] - starts[n] of them."""
    x_RHD = x_RHD if x_RHD.stride(2) == 1 else x_RHD.contiguous()
    out = _taken(x_RHD, first_N, starts_N, total)
    row, head, _ = (stride * x_RHD.itemsize for stride in x_RHD.stride())
    heads, size = x_RHD.shape[1], x_RHD.shape[2] * x_RHD.itemsize
    lengths = (len(first_N), total, heads, size, row, head)
    call("rows_take", x_RHD.device, x_RHD, out, first_N, starts_N, *lengths)
    return out


@take.register_fake
def _taken(x_RHD, first_N, starts_N, total):
    return x_RHD.new_empty((total, *x_RHD.shape[1:]))


@torch.library.custom_op("megaarch::rows_add", mutates_args=())
def add(
    calls: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    readers: torch.Tensor,
    origin: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """[R, H, D]: each row the sum of those that its piece's readers have. calls: one or two."""
    a, *b = (x.contiguous() for x in calls)
    out = _added(calls, bounds, readers, origin, rows)
    where = (out, bounds, readers, origin, len(bounds) - 1)
    width = out[0].numel() if rows else 0
    call("rows_add", a.device, a, len(a), b[0] if b else None, *where, rows, width, a.dtype)
    return out


@add.register_fake
def _added(calls, bounds, readers, origin, rows):
    return calls[0].new_empty((rows, *calls[0].shape[1:]))
