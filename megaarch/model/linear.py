"""Matrix products; on a CPU by what is fastest there.

fp32 products run in oneDNN where a processor that is not Intel's has AVX-512: MKL keeps to AVX2 there,
and is the faster of the two elsewhere (docs/log.md). In half precision, on a processor without units for
it, torch emulates each multiply, many times slower than fp32. So operands and result keep their 16-bit
values, and the product in between runs in fp32: a unit for bfloat16 multiplies 16 bits and adds in 32 too.

A few rows of fp32 without gradients, as generation has them, run in a kernel of our own (kernels/decode.py).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from megaarch.kernels import cpu_features
from megaarch.kernels.bindings import accumulator, plain
from megaarch.kernels.decode import DTYPES, FEW, few_rows, may_run

HALF = (torch.bfloat16, torch.float16)
CPU_HAS_UNITS = cpu_features.has_units_for_half()
ONEDNN_IS_FASTER = cpu_features.multiplies_faster_by_onednn()


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `linear` of tensors of one dtype, without gradients."""
    return (_multiply if _in_fp32_on_cpu(x, dtype=x.dtype) else F.linear)(x, weight, bias)


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a.T @ b in fp32 at least, without gradients: a share of a weight's gradient [outputs,
    inputs], of a [rows, outputs] and b [rows, inputs]. Either axis of the result may be the contiguous
    one; make it contiguous before an optimizer sees it."""
    if a.is_cpu and not _in_fp32_on_cpu(a, b, dtype=a.dtype):
        return (a.t() @ b).to(accumulator(a.dtype))
    return _transposed_multiply(a, b)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the gradient of a weight [outputs, inputs] of this dtype, from that of a product [..., outputs]
    and its input [..., inputs]. A master weight's stays in fp32, as the units sum it: it is neither rounded
    nor converted on its way to the master."""
    rows, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if dtype == x.dtype and not _in_fp32_on_cpu(rows, x, dtype=dtype):
        return rows.t() @ x
    return transposed_product(rows, x).contiguous().to(dtype)


def bias_gradient(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the gradient of a bias [outputs] of this dtype, from that of a product [..., outputs]."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=accumulator(grad.dtype)).to(dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As torch.nn.functional.linear, in x's dtype, whatever that of the parameters is."""
    if _are_few_rows(x, weight, bias):
        return few_rows(x, weight, bias)
    if _in_fp32_on_cpu(x, weight, dtype=x.dtype) or _has_master_weight(x, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.multiply(input, self.weight, self.bias)

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `forward`, with other parameters than its own: a tensor rank's share of them."""
        return linear(x, weight, bias)


def _are_few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    few = may_run() and x.numel() <= FEW * weight.shape[1]
    return few and plain(x, weight, bias, dtypes=DTYPES)


def _in_fp32_on_cpu(*tensors: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` runs here and in fp32. A DTensor's is torch's own."""
    if any(type(x) not in (torch.Tensor, nn.Parameter) or not x.is_cpu for x in tensors):
        return False
    if torch.compiler.is_compiling():
        return False
    return (dtype in HALF and not CPU_HAS_UNITS) or (dtype == torch.float32 and ONEDNN_IS_FASTER)


def _has_master_weight(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GPU multiplies 16 bits of a plain fp32 weight."""
    return (
        x.device.type == "cuda"
        and x.dtype in HALF
        and weight.dtype == torch.float32
        and not isinstance(weight, DTensor)
    )


class _Linear(torch.autograd.Function):
    """A product on a CPU in fp32; or on a GPU, of a master weight."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply(grad, weight.t())
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad, x, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = bias_gradient(grad, ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As F.linear, of tensors of one dtype."""
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.float()
    return _linear_fp32(x.float(), weight.float(), bias).to(x.dtype)


def _transposed_multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a.T @ b in fp32 at least, on a CPU such that oneDNN copies the narrower of the two."""
    if a.is_cpu:
        a, b = a.float(), b.float()
        return (
            _linear_fp32(a.t(), b.t())
            if a.shape[1] <= b.shape[1]
            else _linear_fp32(b.t(), a.t()).t()
        )
    if a.device.type == "cuda" and a.dtype in HALF:  # the units' sums, never rounded to 16 bits
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return (a.t() @ b).to(accumulator(a.dtype))


def _linear_fp32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As F.linear. oneDNN copies x if its rows do not lie in order."""
    if not ONEDNN_IS_FASTER or not x.numel() or not weight.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
