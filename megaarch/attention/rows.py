"""Rows into the calls of a kernel and out again: `Take` and `Put`, each the other's transpose.

Index kernels on the device only; nothing waits for it.

Shape suffixes: B rows, S length, H heads, D head size; G tiles of a call, L padded length.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

Where = tuple[slice, slice] | torch.Tensor  # batch and row ranges, or int64 flat rows [G, L]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ranges:
    """Segments of flat rows, one behind the other: the T rows of a call.

    first: int64 [N], a segment's first row. starts: int32 [N + 1], where segments start among the T
    rows, and T. total: T, on the host. whole: they are all rows of a tensor in order.
    """

    first: np.ndarray | torch.Tensor
    starts: np.ndarray | torch.Tensor
    total: int
    whole: bool

    def on(self, device: torch.device) -> "Ranges":
        return replace(
            self, first=to_device(self.first, device), starts=to_device(self.starts, device)
        )

    def index(self) -> torch.Tensor:
        """The flat rows, int64 [1, T], made where `first` and `starts` are tensors."""
        offset, lengths = self.first - self.starts[:-1], self.starts.diff()
        here = torch.arange(self.total, device=offset.device)
        return (here + offset.repeat_interleave(lengths, output_size=self.total))[None]


def nothing(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Zero in q's shape, with zero gradients for all, whatever they hold."""
    always = torch.ones((), dtype=torch.bool, device=q.device)
    q, *others = (x.masked_fill(always, 0) for x in (q, *others))
    return q + sum(x.sum() for x in others)


def to_device(x, device: torch.device):
    """Arrays become tensors, without waiting for the device; anything else stays what it is."""
    if not isinstance(x, np.ndarray):
        return x
    x = torch.from_numpy(x)
    if device.type == "cpu":
        return x
    x = x if x.is_pinned() else x.pin_memory()
    return x.to(device, non_blocking=True)


def pinned(plan: Any) -> Any:
    """A plan with its arrays in pinned memory, so that `to_device` has nothing left to do in the step
    but a copy that runs on its own. What it is made of: dataclasses, tuples and dicts."""
    if isinstance(plan, np.ndarray):
        return torch.from_numpy(plan).pin_memory().numpy()
    if isinstance(plan, dict):
        return {key: pinned(x) for key, x in plan.items()}
    if isinstance(plan, tuple):
        return tuple(map(pinned, plan))
    if is_dataclass(plan):
        return replace(plan, **{f.name: pinned(getattr(plan, f.name)) for f in fields(plan)})
    return plan


def pick(x: torch.Tensor, where: Where) -> torch.Tensor:
    """Rows of x [B, S, ...] as [G, L, ...]."""
    if isinstance(where, tuple):
        return x[where]
    return x.flatten(0, 1).index_select(0, where.flatten()).unflatten(0, where.shape)


class Take(torch.autograd.Function):
    """Rows of x for each call, [G, L, H, D]; the gradients are added up in one tensor. once: no row is
    taken twice."""

    @staticmethod
    def forward(ctx, x_BSHD, sides, once=False):
        ctx.set_materialize_grads(False)
        ctx.sides, ctx.shape, ctx.once = sides, x_BSHD.shape, once
        return tuple(pick(x_BSHD, where) for where in sides)

    @staticmethod
    def backward(ctx, *grads):
        given = [x for x in zip(ctx.sides, grads, strict=True) if x[1] is not None]
        if not given:
            return None, None, None
        given.sort(key=lambda x: not _is_whole(*x, ctx.shape))
        (where, grad), *rest = given
        if _is_whole(where, grad, ctx.shape):
            plain = torch.contiguous_format
            total, given = grad.clone(memory_format=plain) if rest else grad, rest
        else:
            filled = ctx.once and sum(g[..., 0, 0].numel() for _, g in given) == _rows(ctx.shape)
            total = grad.new_empty(ctx.shape) if filled else grad.new_zeros(ctx.shape)
        for where, grad in given:
            if isinstance(where, tuple):
                total[where] = grad if ctx.once else total[where] + grad
                continue
            rows, index, grad = total.view(-1, *ctx.shape[2:]), where.flatten(), grad.flatten(0, 1)
            rows.index_copy_(0, index, grad) if ctx.once else rows.index_add_(0, index, grad)
        return total, None, None


def _is_whole(where: Where, grad: torch.Tensor, shape: torch.Size) -> bool:
    return isinstance(where, tuple) and grad.shape == shape


def _rows(shape: torch.Size) -> int:
    return shape[0] * shape[1]


class Put(torch.autograd.Function):
    """The results of the calls as rows of one tensor, zero where no call writes."""

    @staticmethod
    def forward(ctx, puts, shape, filled, *results):
        ctx.set_materialize_grads(False)
        ctx.puts, ctx.shapes = puts, [result.shape for result in results]
        first = results[0]
        out = first.new_empty(shape) if filled else first.new_zeros(shape)
        rows = out.view(-1, *shape[2:])
        for (to, source), result in zip(puts, results, strict=True):
            if isinstance(to, tuple):
                out[to] = result[:, source:]
                continue
            flat = result.flatten(0, 1)
            rows.index_copy_(0, to, flat if source is None else flat.index_select(0, source))
        return out

    @staticmethod
    def backward(ctx, grad_BSHD):
        if grad_BSHD is None:
            return None, None, None, *(None for _ in ctx.puts)
        rows, grads = grad_BSHD.flatten(0, 1), []
        for (to, source), shape in zip(ctx.puts, ctx.shapes, strict=True):
            if isinstance(to, tuple):
                grad = grad_BSHD[to]
                if source:
                    grad = torch.cat((grad.new_zeros((shape[0], source, *shape[2:])), grad), dim=1)
            else:
                grad = rows.index_select(0, to)
                if source is not None:
                    whole = grad.new_zeros((shape[0] * shape[1], *shape[2:]))
                    grad = whole.index_copy_(0, source, grad)
                grad = grad.view(shape)
            grads.append(grad)
        return None, None, None, *grads
