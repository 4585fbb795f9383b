"""Our own kernel for CPUs, csrc/cpu/attention.cpp: runs parts as they are, with sums in fp32.

No plan, no gather and no mask: it loops over a part's blocks and leaves out those that a causal one
hides, so that every mask costs its exact area and what lies along a diagonal.
"""

import ctypes

import torch
from torch.autograd.function import once_differentiable

from megaarch.attention.bias import RelativeBias, relative_bucket
from megaarch.attention.parts import Parts
from megaarch.attention.sdpa import compute_dtype
from megaarch.kernels import library

HEAD_SIZES = (256, 8)  # most, and the divisor
DTYPES = (torch.float32, torch.bfloat16)  # that it reads and writes
PADDING = 32  # BIAS_PADDING of csrc/cpu.h
NO_BIAS = (None, None, 0)  # positions of queries and of keys, and the farthest distance


def cannot_run(
    q: torch.Tensor, k: torch.Tensor, parts: Parts, bias: RelativeBias | None
) -> str | None:
    most, divisor = HEAD_SIZES
    if q.device.type != "cpu":
        return f"it runs on CPUs, not {q.device.type}"
    if reason := library.obstacle("cpu"):
        return reason
    if compute_dtype(q) != torch.float32:
        return f"it computes in fp32, not {str(compute_dtype(q)).removeprefix('torch.')}"
    if q.dtype not in DTYPES:
        return f"it takes fp32 and bf16, not {str(q.dtype).removeprefix('torch.')}"
    if not library.serves(q, k, *(() if bias is None else (bias.table,))):
        return "it takes plain tensors, neither fake nor traced"
    if q.shape[-1] > most or q.shape[-1] % divisor:
        return f"it takes head sizes that are multiples of {divisor}, up to {most}"
    return None


def warm(parts: Parts, device_type: str) -> None:
    """It plans nothing."""


def attend(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    parts: Parts,
    scale: float,
    bias: RelativeBias | None = None,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `attend.attend`, whose contract this fulfils."""
    q, k, v = (x.to(q_BSHD.dtype) for x in (q_BSHD, k_BSHD, v_BSHD))
    if bias is None:
        return _Attention.apply(q, k, v, None, parts, scale, NO_BIAS)
    positions = [x if x.ndim == 2 else x[..., 0] for x in (query_positions, key_positions)]
    asked = (*(x.long().contiguous() for x in positions), bias.max_distance)
    return _Attention.apply(q, k, v, _figures(bias), parts, scale, asked)


def _figures(bias: RelativeBias) -> torch.Tensor:
    """[heads, distances], fp32: what the kernel adds where a query lies so far behind its key, from
    the farthest ahead on."""
    reach = bias.max_distance
    behind = torch.arange(-reach - PADDING, reach + PADDING + 1).clamp(-reach, reach)
    bucket = relative_bucket(-behind, bias.bidirectional, bias.table.shape[0], reach)
    return bias.table.float().index_select(0, bucket).t().contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, figures, parts, scale, asked):
        q, k, v = (_rows(x) for x in (q, k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        _call("attention_forward", (q, k, v), (out, lse), parts, scale, (figures, *asked))
        ctx.save_for_backward(q, k, v, figures, out, lse)
        ctx.rest = parts, scale, asked
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, figures, out, lse = ctx.saved_tensors
        parts, scale, asked = ctx.rest
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        of_rows = None if figures is None else figures.new_zeros(len(parts), *figures.shape)
        tensors = (_rows(grad), q, k, v), (out, lse, *grads)
        _call("attention_backward", *tensors, parts, scale, (figures, of_rows, *asked))
        of_figures = None if of_rows is None else of_rows.sum(0)
        return *grads, of_figures, None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _call(name, strided, contiguous, parts, scale, bias) -> None:
    *_, q, k, _ = strided
    strides = [stride for x in strided for stride in x.stride()[:3]]
    array = (ctypes.c_int64 * len(strides))(*strides)
    rows, most = parts.table.shape[:2]
    lengths = (rows, most, parts.queries, parts.keys, q.shape[2], k.shape[2], q.shape[3])
    figures = (parts.table.ctypes.data, array, *lengths, scale, *bias, q.dtype)
    library.call(name, q.device, *strided, *contiguous, *figures)
