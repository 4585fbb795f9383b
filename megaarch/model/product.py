"""Matrix products in half precision, also on a CPU that has no units for it.

There torch emulates each 16-bit multiply, many times slower than fp32 (docs/log.md). So operands
and result keep their 16-bit values, and the product in between runs in fp32: what a unit for
bfloat16 does, which multiplies 16 bits and adds in 32.
"""

import torch
import torch.nn.functional as F
from torch import nn

HALF = (torch.bfloat16, torch.float16)
CPU_HAS_UNITS = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, of one dtype, in that dtype."""
    if _emulated(a.device, a.dtype):
        with torch.autocast("cpu", enabled=False):  # it would round the operands again, and emulate
            return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def _emulated(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in HALF and not CPU_HAS_UNITS


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As torch.nn.functional.linear, autocast included."""
    device, dtype = x.device, x.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    plain = type(weight) in (torch.Tensor, nn.Parameter)  # a DTensor's product is torch's own
    if plain and _emulated(device, dtype):
        return _Linear.apply(x, weight, bias, dtype)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        x, rounded = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, rounded)
        bias = None if bias is None else bias.to(dtype).float()
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), rounded.float(), bias).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        x, rounded = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        rows = grad.float().flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ rounded.float()).to(of_x).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.float().flatten(0, -2)).to(of_weight)
        if of_bias is not None and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(of_bias)
        return grad_x, grad_weight, grad_bias, None


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
