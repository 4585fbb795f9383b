"""Gated activations (Shazeer 2020), in one pass each way on a CPU, with nothing kept but the input."""

import torch

from megaarch.kernels.bindings import ACTIVATIONS, call


class Gated(torch.autograd.Function):
    """apply(x [..., F, 2], swiglu or geglu) -> gate(x[..., 0]) · x[..., 1]; GEGLU's gate is the tanh
    approximation."""

    @staticmethod
    def forward(ctx, x, name):
        x = x.contiguous()
        out = x.new_empty(x.shape[:-1])
        ctx.gate = ACTIVATIONS[name]
        call("gated_forward", x.device, x, out, out.numel(), ctx.gate, x.dtype)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        (x,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(x)
        call("gated_backward", x.device, grad, x, out, grad.numel(), ctx.gate, x.dtype)
        return out, None
