"""Matrix products; on a CPU by what is fastest there.

In fp32, by oneDNN: its kernels use all that a processor has, where MKL keeps to AVX2 on other makers'
than its own (docs/log.md). In half precision, on a processor without units for it, torch emulates each
multiply, many times slower than fp32. So operands and result keep their 16-bit values, and the product
in between runs in fp32: what a unit for bfloat16 does, which multiplies 16 bits and adds in 32.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

HALF = (torch.bfloat16, torch.float16)
CPU_HAS_UNITS = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
CHOICE = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # else no MKL


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a [..., K] @ b [K, N] in a's dtype."""
    return linear(a, b.t())


def turned_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a [R, M], turned, @ b [R, N] in fp32 at least, without gradients: a share of a weight's
    gradient, to be added to others. Either axis of the result may be the contiguous one: to be
    mended before an optimizer sees it."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if _ours(a, b, dtype=a.dtype):
        return _turned(a.float(), b.float())
    if a.device.type == "cuda" and a.dtype in HALF:  # the units' own sums, never rounded to 16 bits
        return torch.mm(a.t(), b, out_dtype=wide)
    return (a.t() @ b).to(wide)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As torch.nn.functional.linear, in x's dtype, whatever that of the parameters is."""
    if _ours(x, weight, dtype=x.dtype):
        return _Linear.apply(x, weight, bias)
    if _has_masters(x, weight):
        return _OfMasters.apply(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self.weight, self.bias)

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `forward`, with other parameters than its own: a tensor rank's share of them."""
        return linear(x, weight, bias)


def _ours(*tensors: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` is not left to torch. A DTensor's is torch's own."""
    if any(type(x) not in (torch.Tensor, nn.Parameter) or not x.is_cpu for x in tensors):
        return False
    if torch.compiler.is_compiling():
        return False
    return (dtype in HALF and not CPU_HAS_UNITS) or (dtype == torch.float32 and CHOICE)


def _has_masters(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GPU multiplies 16 bits of a plain fp32 weight."""
    return (
        x.device.type == "cuda"
        and x.dtype in HALF
        and weight.dtype == torch.float32
        and not isinstance(weight, DTensor)
    )


class _OfMasters(torch.autograd.Function):
    """A layer whose weight's gradient leaves the product in fp32: it is neither rounded nor
    converted on its way to the master."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.of_bias = None if bias is None else bias.dtype
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_bias = None if ctx.of_bias is None else rows.sum(0, dtype=ctx.of_bias)
        return grad @ weight, turned_product(rows, x.flatten(0, -2)), grad_bias


def _fp32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] @ weight [N, K], turned, + bias [N]. oneDNN copies x if its rows do not lie in order."""
    if not CHOICE or not x.numel() or not weight.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _turned(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a, turned, @ b, so that oneDNN copies the narrower of the two."""
    return _fp32(a.t(), b.t()) if a.shape[1] <= b.shape[1] else _fp32(b.t(), a.t()).t()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.of_weight, ctx.of_bias = weight.dtype, None if bias is None else bias.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        bias = None if bias is None else bias.to(x.dtype).float()
        return _fp32(x.float(), weight.float(), bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.float()
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _fp32(grad, weight.float().t()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_rows = _turned(rows, x.float().reshape(-1, x.shape[-1]))
            grad_weight = of_rows.contiguous().to(ctx.of_weight)
        if ctx.of_bias is not None and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.of_bias)
        return grad_x, grad_weight, grad_bias
