"""Our own kernel for CPUs, csrc/cpu/attention.cpp: runs parts as they are, with sums in fp32.

No plan, no gather and no mask: it loops over a part's blocks and leaves out those that a causal one
hides, so that every mask costs its exact area and what lies along a diagonal.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megaarch.attention.bias import RelativeBias
from megaarch.attention.kernel_interface import AttentionInputs, Kernel
from megaarch.attention.mask import UNUSED, Parts
from megaarch.kernels import bindings

HEAD_SIZES = (256, 8)  # largest and divisor
DTYPES = (torch.float32, torch.bfloat16)  # that it reads and writes
PADDING = 32  # BIAS_PADDING of csrc/cpu.h
NO_BIAS = (None, None, 0)  # positions of queries and of keys, and the farthest distance


@dataclass(frozen=True)
class CpuKernel(Kernel):
    def cannot_run(self, inputs: AttentionInputs) -> str | None:
        q, bias, (largest, divisor) = inputs.q, inputs.bias, HEAD_SIZES
        if q.device.type != "cpu":
            return f"it runs on CPUs, not {q.device.type}"
        if reason := bindings.obstacle("cpu"):
            return reason
        if q.dtype not in DTYPES:
            return f"it takes fp32 and bf16, not {str(q.dtype).removeprefix('torch.')}"
        if not bindings.serves(q, inputs.k, *(() if bias is None else (bias.table,))):
            return "it takes plain tensors, neither fake nor traced"
        if q.shape[-1] > largest or q.shape[-1] % divisor:
            return f"it takes head sizes that are multiples of {divisor}, up to {largest}"
        return None

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        q, k, v = (x.to(inputs.q.dtype) for x in (inputs.q, inputs.k, inputs.v))
        if inputs.bias is None:
            plain = q.dtype == torch.float32 and not torch.is_grad_enabled()
            if plain and inputs.parts.plan("one query", _one_query_sees_all):
                return _one_query(q, k, v, inputs.scale)
            return _Attention.apply(q, k, v, None, inputs.parts, inputs.scale, NO_BIAS)
        positions = (x.long().contiguous() for x in inputs.positions)
        by_distance = (*positions, inputs.bias.max_distance)
        table = bias_by_distance(inputs.bias)
        return _Attention.apply(q, k, v, table, inputs.parts, inputs.scale, by_distance)


def _one_query_sees_all(parts: Parts) -> bool:
    """Whether each row is one query that sees all keys, as in generation from prompts of one length."""
    table = parts.table
    if parts.queries != 1 or table.shape[1] != 1 or not parts.keys:
        return False
    return bool((table[:, 0, 0] != UNUSED).all() and (table[:, 0, 3:] == (0, parts.keys)).all())


def _one_query(q, k, v, scale: float) -> torch.Tensor:
    """torch's: for one query our own copies more of the keys than it computes (docs/log.md)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def bias_by_distance(bias: RelativeBias) -> torch.Tensor:
    """Returns [H, distances], fp32: what the kernel adds where a query lies so far behind its key, from
    the farthest ahead on."""
    reach = bias.max_distance
    behind = torch.arange(-reach - PADDING, reach + PADDING + 1).clamp(-reach, reach)
    bucket = bias.bucket_by_distance()[reach - behind]
    return bias.table.float().index_select(0, bucket).t().contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, parts, scale, by_distance):
        q, k, v = (_with_dense_heads(x) for x in (q, k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        _call("attention_forward", (q, k, v), (out, lse), parts, scale, (table, *by_distance))
        ctx.save_for_backward(q, k, v, table, out, lse)
        ctx.rest = parts, scale, by_distance
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        q, k, v, table, out, lse = ctx.saved_tensors
        parts, scale, by_distance = ctx.rest
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        by_row = None if table is None else table.new_zeros(len(parts), *table.shape)
        tensors = (_with_dense_heads(grad), q, k, v), (out, lse, *grads)
        _call("attention_backward", *tensors, parts, scale, (table, by_row, *by_distance))
        return *grads, None if by_row is None else by_row.sum(0), None, None, None


def _with_dense_heads(x_BSHDh: torch.Tensor) -> torch.Tensor:
    return x_BSHDh if x_BSHDh.stride(3) == 1 else x_BSHDh.contiguous()


def _call(name, strided, contiguous, parts, scale, bias) -> None:
    *_, q, k, _ = strided
    strides = [stride for x in strided for stride in x.stride()[:3]]
    rows, most = parts.table.shape[:2]
    lengths = (rows, most, parts.queries, parts.keys, q.shape[2], k.shape[2], q.shape[3])
    arguments = (parts.table.ctypes.data, strides, *lengths, scale, *bias, q.dtype)
    bindings.call(name, q.device, *strided, *contiguous, *arguments)


KERNEL = CpuKernel("cpu")
