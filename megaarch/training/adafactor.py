"""torch's Adafactor (Shazeer and Stern 2018) for parameters that are sharded: its own step writes
into row and column norms in place, which DTensors refuse.

The state has torch's names and shapes, so that a checkpoint serves both.
"""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate


class Adafactor(torch.optim.Adafactor):
    """torch.optim.Adafactor, equal to it up to rounding; takes DTensors."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step. closure: None."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, p.grad, self.state[p], group)


def _update(p: torch.Tensor, grad: torch.Tensor, state: dict, group: dict[str, Any]) -> None:
    floor, scale = group["eps"]
    floor = torch.finfo(p.dtype).eps if floor is None else floor
    state.setdefault("step", torch.tensor(0.0))
    state["step"] += 1
    step, rate = state["step"].item(), float(group["lr"])
    share = step ** group["beta2_decay"]
    alpha = max(scale, _root_mean_square(p)) * min(rate, step**-0.5)
    p.mul_(1 - rate * group["weight_decay"])
    if grad.ndim > 1:
        square = grad.square()
        for name, axis in (("row_var", -1), ("col_var", -2)):
            mean = _complete(square.sum(axis, keepdim=True) / grad.shape[axis])
            state.setdefault(name, torch.zeros_like(mean)).lerp_(mean, share)
        row, column = state["row_var"], state["col_var"]
        mean = _complete(row.sum(-2, keepdim=True) / row.shape[-2])
        estimate = row * column / mean.clamp(min=floor)
    else:
        estimate = state.setdefault("variance", torch.zeros_like(grad))
        estimate.lerp_(grad.square(), share)
    update = estimate.clamp(min=floor * floor).rsqrt() * grad
    p.add_(update, alpha=-alpha / max(1.0, _root_mean_square(update) / group["d"]))


def _complete(tensor: torch.Tensor) -> torch.Tensor:
    """Sums what is partial over ranks."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def _root_mean_square(tensor: torch.Tensor) -> float:
    total = tensor.square().sum()
    if isinstance(total, DTensor):
        total = total.full_tensor()
    return math.sqrt(total.item() / tensor.numel())
