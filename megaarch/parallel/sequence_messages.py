"""The messages of sequence parallelism: tokens gathered from all tensor-parallel ranks, and summed and scattered to
them (Korthikanti et al. 2022, figure 5).

They are sent by torch's functional collectives, which a compiled layer takes into its graph, and not by a DTensor's
redistribution, whose host time is six times as long (docs/log.md). Letters of shapes: docs/shapes.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

MESSAGES = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ranks:
    """The tensor-parallel ranks that this process is one of. own: its rank. group: the name of their process
    group."""

    number: int
    own: int
    group: str

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "Ranks":
        """mesh: of one axis."""
        return cls(mesh.size(), mesh.get_local_rank(), mesh.get_group().group_name)


def gather(x_BsD: torch.Tensor, ranks: Ranks, *, summands: bool) -> torch.Tensor:
    """Returns the tokens of all ranks, [B, S, D], from each one's. summands: whether every rank has a summand of the
    result's gradient; else each has all of it."""
    return _Gather.apply(x_BsD, ranks, summands)


def scatter(x_BSD: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Returns this rank's share [B, s, D] of the sum over ranks, each of which has a summand."""
    return _Scatter.apply(x_BSD, ranks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BsD, ranks, summands):
        ctx.ranks, ctx.summands = ranks, summands
        return gathered(start_gather(x_BsD, ranks), ranks)

    @staticmethod
    def backward(ctx, grad_BSD):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        ranks = ctx.ranks
        if ctx.summands:
            return scattered(start_scatter(grad_BSD, ranks)), None, None
        return grad_BSD.chunk(ranks.number, dim=1)[ranks.own], None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSD, ranks):
        ctx.ranks = ranks
        return scattered(start_scatter(x_BSD, ranks))

    @staticmethod
    def backward(ctx, grad_BsD):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        return gathered(start_gather(grad_BsD, ctx.ranks), ctx.ranks), None


def start_gather(x_BsD: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sends this rank's tokens to all; `gathered` waits for those of all."""
    return MESSAGES.all_gather_into_tensor(x_BsD.contiguous(), ranks.number, ranks.group)


def gathered(message: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Returns [B, S, D] of `start_gather`."""
    x_WBsD: Any = MESSAGES.wait_tensor(message).unflatten(0, (ranks.number, -1))
    return x_WBsD.movedim(0, 1).flatten(1, 2)


def start_scatter(x_BSD: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sends each rank the summand of its tokens; `scattered` waits for the sum."""
    x_WBsD = x_BSD.unflatten(1, (ranks.number, -1)).movedim(1, 0)
    message = x_WBsD.flatten(0, 1).contiguous()
    return MESSAGES.reduce_scatter_tensor(message, "sum", ranks.number, ranks.group)


def scattered(message: torch.Tensor) -> torch.Tensor:
    """Returns [B, s, D] of `start_scatter`."""
    return MESSAGES.wait_tensor(message)
