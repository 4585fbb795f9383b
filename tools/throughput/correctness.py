"""Whether a kernel may be timed: its output and gradients against the dense fp64 reference, and whether
what ran is what was asked for.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaarch.attention import KERNELS, Parts, attend

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of a norm


def fault(
    found: tuple[torch.Tensor, ...],
    leaves: tuple[torch.Tensor, ...],
    output_grad: torch.Tensor,
    parts: Parts,
) -> str | None:
    """What is wrong with output or gradients, or None: the first group of heads in the row of most
    parts, against the reference on the same inputs (rows and heads do not meet)."""
    q, k, v = leaves
    row = int(np.argmax((parts.table[:, :, 0] != 0).sum(1)))
    group = q.shape[2] // k.shape[2]
    heads = (slice(0, group), slice(0, 1), slice(0, 1))
    one = Parts(parts.table[row : row + 1], parts.queries, parts.keys)
    mine = one_q, one_k, one_v = tuple(
        x.detach()[row : row + 1, :, h].double().requires_grad_()
        for x, h in zip((q, k, v), heads, strict=True)
    )
    out = attend(one_q, one_k, one_v, one, kernel="reference")
    grad = output_grad[row : row + 1, :, :group].double()
    expected = (out, *torch.autograd.grad(out, mine, grad))
    for name, a, b, h in zip(
        ("output", "dq", "dk", "dv"), expected, found, (heads[0], *heads), strict=True
    ):
        b = b.detach()[row : row + 1, :, h].double()
        error = float((b - a.detach()).norm() / a.detach().norm().clamp(min=1e-30))
        if not error <= TOLERANCE[q.dtype]:
            return f"{name} differs from the reference by {error:.2g} of its norm"
    return None


def impostor(kernel: str, operators: list[str]) -> str | None:
    """What is wrong with the operators that ran for a kernel, or None."""
    expected = KERNELS[kernel].operators
    if expected and not any(re.search(expected, name, re.IGNORECASE) for name in operators):
        return f"{kernel} was asked for and {', '.join(operators)} ran"
    return None


class _Operators(TorchDispatchMode):
    """The names of torch's operators that ran, in the order in which they first did."""

    def __init__(self):
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] = None
        return function(*args, **(kwargs or {}))


def operators(run: Callable[[], Any], device: torch.device) -> list[str]:
    """What really ran: the GPU kernels that took longest, or a CPU's attention operators."""
    if device.type != "cuda":
        with _Operators() as ran:
            run()
        return [name for name in ran.names if "attention" in name] or list(ran.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [event.key[:120] for event in events if event.self_device_time_total > 0][:6]
