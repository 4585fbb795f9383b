"""RMSNorm, forward and backward each one pass over the rows (Zhang and Sennrich 2019, equation 4).

The weight's gradient is summed in two stages in a fixed order: no atomics, the same bits each time.
On a CPU it takes the place of torch's unasked, as a plain autograd function: an operator's first
call imports torch's compiler, which takes seconds.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megaarch.kernels.bindings import accumulator, call, operator, serves

# first-stage sums of the weight's gradient; CUDA: 4 blocks for each of 132 processors
PARTIALS = {"cuda": 528, "cpu": 16}


class RMSNorm(nn.RMSNorm):
    """torch's, by `rms_norm`. fused: on CUDA too."""

    def __init__(self, size: int, epsilon: float, fused: bool):
        super().__init__(size, epsilon)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.fused)  # pyright: ignore[reportArgumentType]  # no None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, fused: bool = True
) -> torch.Tensor:
    """Returns x [..., D] over its root mean square, times weight [D], in x's dtype; statistics in
    fp32 at least. Not fused: torch's where the CPU's kernels do not serve."""
    weight = weight.to(x.dtype)
    if serves(x, weight):
        if torch.is_grad_enabled():
            return _Eager.apply(x, weight, epsilon)[0]
        return _forward(x, weight, epsilon)[0]
    if fused:
        return _operator(x, weight, epsilon)[0]
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _outputs(x, weight, epsilon):
    scale = x.new_empty((*x.shape[:-1], 1), dtype=accumulator(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), scale


def _forward(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and 1 / root mean square of each row [..., 1]."""
    x, weight = x.contiguous(), weight.contiguous()
    out, scale = _outputs(x, weight, epsilon)
    sizes = (scale.numel(), len(weight), epsilon, x.dtype)
    call("rms_norm_forward", x.device, x, weight, out, scale, *sizes)
    return out, scale


def _gradients(grad, x, weight, scale):
    plain = torch.contiguous_format
    return torch.empty_like(x, memory_format=plain), torch.empty_like(weight, memory_format=plain)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grads = _gradients(grad, x, weight, scale)
    rows, width = scale.numel(), len(weight)
    partials = max(1, min(rows, PARTIALS[x.device.type]))
    scratch = (scale.new_empty((partials, width)), partials)
    tensors = (grad, x, weight, scale, *grads, *scratch)
    call("rms_norm_backward", x.device, *tensors, rows, width, x.dtype)
    return grads


_operator = operator("rms_norm", _outputs)(_forward)
_backward_operator = operator("rms_norm_backward", _gradients)(_backward)


def _keep(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _by(backward: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., tuple]:
    """Returns the gradients of x, weight and epsilon, by what computes the first two."""

    def differentiate(ctx, grad, _):
        return (None,) * 3 if grad is None else (*backward(grad, *ctx.saved_tensors), None)

    return differentiate


_operator.register_autograd(_by(_backward_operator), setup_context=_keep)


class _Eager(torch.autograd.Function):
    forward = staticmethod(_forward)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_by(_backward))
