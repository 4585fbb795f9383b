"""Rows gathered into a kernel's calls, and the calls' results scattered to the rows of the output.

Two implementations: `IndexGather` here, by torch's index kernels and an index of each row; and
fused_gather.py, by kernels of our own that take segments. Nothing waits for the device.

Letters of shapes: docs/shapes.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Rows = tuple[slice, slice] | torch.Tensor  # batch and row ranges, or int64 flat rows [G, Q or K]
# rows that a call reads, of queries and of keys and values, and rows that it writes
AXES = ("q", "k", "out")


@dataclass(frozen=True)
class Segments:
    """Segments of flat rows, one after the other: the T rows of a variable-length call.

    first: int64 [N], a segment's first row. starts: int32 [N + 1], where segments start among the T
    rows, and T. total: T, on the host. whole: they are all rows of a tensor in order. longest: rows of
    the longest segment.
    """

    first: Any
    starts: Any
    total: int
    whole: bool
    longest: int

    @classmethod
    def of(cls, first: np.ndarray, lengths: np.ndarray, rows: int) -> "Segments":
        """On the host. rows: of the tensor."""
        starts = np.concatenate(([0], np.cumsum(lengths)))
        total = int(starts[-1])
        whole = total == rows and bool((first == starts[:-1]).all())
        return cls(first, starts.astype(np.int32), total, whole, int(lengths.max()))

    def index(self) -> torch.Tensor:
        """Returns the flat rows, int64 [1, T], made where `first` and `starts` are tensors."""
        offset, lengths = self.first - self.starts[:-1], self.starts.diff()
        here = torch.arange(self.total, device=offset.device)
        return (here + offset.repeat_interleave(lengths, output_size=self.total))[None]


@dataclass(frozen=True)
class Gather(ABC):
    """Moves rows into the calls of a plan and out again, on one device. calls: the plan's, there. axis: of
    AXES."""

    calls: tuple[Any, ...]

    def gather(self, x_BSHDh: torch.Tensor, axis: str) -> tuple[torch.Tensor, ...]:
        """Returns the rows of x that each call reads, [G, Q or K, H, Dh]. Gradients of a row that
        several calls read are added up."""
        return _Gather.apply(x_BSHDh, self, axis)

    def scatter(self, results: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        """Returns the calls' results as rows of one tensor, zero where no call writes."""
        return _Scatter.apply(self, shape, *results)

    @abstractmethod
    def read(self, x_BSHDh: torch.Tensor, axis: str) -> tuple[torch.Tensor, ...]:
        """Returns each call's rows of x."""

    @abstractmethod
    def add_up(self, given: Sequence[torch.Tensor], axis: str, shape: torch.Size) -> torch.Tensor:
        """Returns the transpose of `read`: sums by row of what each call has for its rows."""


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSHDh, rows, axis):
        ctx.rows, ctx.axis, ctx.shape = rows, axis, x_BSHDh.shape
        return rows.read(x_BSHDh, axis)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.rows.add_up(grads, ctx.axis, ctx.shape), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, shape, *results):
        ctx.rows = rows
        return rows.add_up(results, "out", shape)

    @staticmethod
    def backward(ctx, grad_BSHDh):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        return None, None, *ctx.rows.read(grad_BSHDh, "out")


@dataclass(frozen=True)
class IndexGather(Gather):
    """rows: of each call, by axis. once: axes on which no row is in two calls."""

    rows: dict[str, list[Rows]]
    once: tuple[str, ...] = ("out",)

    def read(self, x_BSHDh: torch.Tensor, axis: str) -> tuple[torch.Tensor, ...]:
        return tuple(gather_rows(x_BSHDh, rows) for rows in self.rows[axis])

    def add_up(self, given: Sequence[torch.Tensor], axis: str, shape: torch.Size) -> torch.Tensor:
        once = axis in self.once
        pairs = list(zip(self.rows[axis], given, strict=True))
        pairs.sort(key=lambda pair: not _is_whole(*pair, shape))
        (rows, grad), *rest = pairs
        if _is_whole(rows, grad, shape):
            plain = torch.contiguous_format
            total, pairs = grad.clone(memory_format=plain) if rest else grad, rest
        else:
            filled = once and sum(g[..., 0, 0].numel() for _, g in pairs) == shape[0] * shape[1]
            total = grad.new_empty(shape) if filled else grad.new_zeros(shape)
        for rows, grad in pairs:
            if isinstance(rows, tuple):
                total[rows] = grad if once else total[rows] + grad
                continue
            flat, index, grad = total.view(-1, *shape[2:]), rows.flatten(), grad.flatten(0, 1)
            flat.index_copy_(0, index, grad) if once else flat.index_add_(0, index, grad)
        return total


def gather_rows(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Returns rows of x [B, S, ...] as [G, Q or K, ...]."""
    if isinstance(rows, tuple):
        return x[rows]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _is_whole(rows: Rows, grad: torch.Tensor, shape: torch.Size) -> bool:
    return isinstance(rows, tuple) and grad.shape == shape
