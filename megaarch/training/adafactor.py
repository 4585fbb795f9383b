"""Adafactor (Shazeer and Stern 2018, algorithms 4 and 5) as T5X has it (t5x/adafactor.py), in any layout.

    V  <-  (1 - t**-0.8) V + t**-0.8 (G² + 1e-30)      of a weight from 128 x 128 on, means of V's rows
                                                       and columns: V = row column / mean
    U  =  G / sqrt(V)
    W  <-  W - rate max(1e-3, RMS(W)) U / max(1, RMS(U))

A projection that is stored fused with others (model/fused_projections.py) has an RMS and column means of its own. A
shard has the means of the whole: what is summed over a split axis is summed over its ranks. Letters of
shapes: docs/shapes.md; O outputs, D inputs, K projections, o and d what is held here.
"""

from collections import defaultdict
from collections.abc import Generator
from math import prod
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import zeros as sharded_zeros

from megaarch.model.fused_projections import Fused
from megaarch.parallel.gradients import local, sum_in_one_message
from megaarch.parallel.parallelize import shard_of

DECAY = 0.8  # of the second moment: t**-0.8 of it is new at step t
LEAST_FACTORED = 128  # rows and columns
EPSILON_SQUARE, EPSILON_SCALE = 1e-30, 1e-3


def factored(shape: torch.Size | tuple[int, ...], fused: Fused) -> bool:
    """Whether means of rows and columns are kept of a parameter, and not every element: where all of its
    projections are large enough."""
    return len(shape) == 2 and min(*fused.sizes(shape[0]), shape[1]) >= LEAST_FACTORED


def kept(shape: tuple[int, ...], fused: Fused) -> int:
    """Returns how many numbers are kept of a parameter."""
    return shape[0] + len(fused.names) * shape[1] if factored(shape, fused) else prod(shape)


class Adafactor(torch.optim.Optimizer):
    """No momentum. Weight decay is AdamW's: times the rate, apart from the gradient (Loshchilov and Hutter
    2019).

    A parameter's attribute `fused` says which projections its rows are; without it, it is one. State of each:
    `row_var` [O, 1] and `col_var` [K, D], else `variance`, fp32, sharded as the parameter is.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._held: dict[torch.Tensor, _Held] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step. closure: None."""
        assert closure is None
        updates = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p not in self._held:
                        self._held[p] = _Held(p)
                    rate, decay = float(group["lr"]), group["weight_decay"]
                    updates.append(_update(self._held[p], self.state[p], rate, decay))
        _sum_together(updates)


class _Held:
    """What this process holds of parameter `p`. members: [K, o], 1 where a row is of a projection."""

    def __init__(self, p: torch.Tensor):
        self.p, self.fused = p, getattr(p, "fused", Fused(("weight",)))
        self.factored = factored(p.shape, self.fused)
        rows = (shard_of(p) or (range(p.shape[0]),))[0]
        self.of_row = self.fused.of_rows(rows).to(p.device)
        kinds = torch.arange(len(self.fused.names), device=p.device)
        self.members = (kinds[:, None] == self.of_row).to(local(p).dtype)
        sizes = torch.tensor(self.fused.sizes(p.shape[0])).clamp(min=1)
        self.sizes = sizes.to(self.members)[:, None]  # [K, 1], rows of the whole

    def over_ranks(self, x: torch.Tensor, *axes: int) -> "_Sum":
        """What was summed over these axes of the shard, with the groups of ranks that split them."""
        groups = []
        if isinstance(self.p, DTensor):
            groups = [
                self.p.device_mesh.get_group(axis)
                for axis, placement in enumerate(self.p.placements)
                if getattr(placement, "dim", None) in axes  # a strided shard's too
            ]
        return x, groups

    def sums_of_squares(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Returns the sum of each projection's squares in each tensor [o, ...]: [K, tensors]."""
        rows = [x.square().reshape(len(x), prod(x.shape[1:])).sum(1) for x in tensors]
        return torch.stack([self.members @ x for x in rows], 1)

    def root_mean_squares(self, sums: torch.Tensor) -> list[torch.Tensor]:
        """Returns of each tensor the RMS of each projection, spread to its rows [o, 1...]."""
        means = sums / self.sizes / prod(self.p.shape[1:])
        shape = (-1, *[1] * (self.p.ndim - 1))
        return [mean[self.of_row].view(shape) for mean in means.sqrt().unbind(1)]

    def zeros(self, shape: tuple[int, ...], split: tuple[int, ...]) -> torch.Tensor:
        """Returns a state of this shape, which is split as the parameter is along these axes of it."""
        if not isinstance(self.p, DTensor):
            return self.p.new_zeros(shape)
        placements = [
            placement if getattr(placement, "dim", None) in split else Replicate()
            for placement in self.p.placements
        ]
        mesh, dtype = self.p.device_mesh, self.p.dtype
        return sharded_zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements)


_Sum = tuple[torch.Tensor, list[distributed.ProcessGroup]]
_Update = Generator[list[_Sum], None, None]


def _sum_together(updates: list[_Update]) -> None:
    """Takes the updates of all parameters, in which each pauses where it needs sums over ranks: one message for
    each group of ranks then has those of all, and not one for each parameter."""
    while updates:
        wanted = [next(update, None) for update in updates]
        updates = [u for u, sums in zip(updates, wanted, strict=True) if sums is not None]
        together: dict[tuple[Any, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for x, groups in (each for sums in wanted for each in sums or ()):
            for group in groups:
                together[group, x.dtype].append(x)
        for (group, _), tensors in together.items():
            sum_in_one_message(tensors, group)


def _update(held: _Held, state: dict[str, Any], rate: float, weight_decay: float) -> _Update:
    """One step of a parameter, whose gradient becomes its update. Yields what is to be summed, in place."""
    p = held.p
    assert p.grad is not None
    weight, grad = local(p), local(p.grad)
    state.setdefault("step", torch.tensor(0.0)).add_(1)
    fresh = state["step"].double() ** -DECAY  # on the host: nothing waits for the device
    square = grad.square().add_(EPSILON_SQUARE)
    if held.factored:
        outputs, inputs = p.shape
        kinds = len(held.fused.names)
        if "row_var" not in state:
            state["row_var"] = held.zeros((outputs, 1), split=(0,))
            state["col_var"] = held.zeros((kinds, inputs), split=(1,))
        row, column = local(state["row_var"]), local(state["col_var"])
        of_rows, of_columns = square.sum(1, keepdim=True), held.members @ square
        del square
        yield [held.over_ranks(of_rows, 1), held.over_ranks(of_columns, 0)]
        _average(row, of_rows / inputs, fresh)
        _average(column, of_columns / held.sizes, fresh)
        mean = column.sum(1, keepdim=True)
        yield [held.over_ranks(mean, 1)]
        by_column = (column / (mean / inputs)).rsqrt()
        by_column = by_column if kinds == 1 else by_column[held.of_row]
        update = grad.mul_(row.rsqrt()).mul_(by_column)
    else:
        if "variance" not in state:
            state["variance"] = held.zeros(tuple(p.shape), split=(0, 1))
        variance = local(state["variance"])
        _average(variance, square, fresh)
        del square
        update = grad.mul_(variance.rsqrt())
    sums = held.sums_of_squares(update, weight)
    yield [held.over_ranks(sums, 0, 1)]
    size, scale = held.root_mean_squares(sums)
    update.div_(size.clamp(min=1.0)).mul_(scale.clamp(min=EPSILON_SCALE))
    weight.mul_(1 - rate * weight_decay).sub_(update, alpha=rate)


def _average(kept: torch.Tensor, new: torch.Tensor, fresh: torch.Tensor) -> None:
    kept.mul_(1 - fresh).add_(new * fresh)
