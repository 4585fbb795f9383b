"""Our own kernel for CPUs, csrc/cpu/attention.cpp: runs parts as they are, computing in fp32.

No plan, no gather and no mask: it loops over a part's blocks and leaves out those that a causal one
hides, so that every mask costs its exact area and what lies along a diagonal.
"""

import ctypes

import torch

from megaarch.attention.bias import RelativeBias
from megaarch.attention.parts import Parts
from megaarch.attention.sdpa import compute_dtype
from megaarch.kernels import library

HEAD_SIZES = (256, 8)  # most, and the divisor
DTYPES = (torch.float32, torch.bfloat16)  # that it reads and writes


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
    if not library.serves(q, k):
        return "it takes plain tensors, neither fake nor traced"
    if bias is not None:
        return "it takes no bias"
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
    dtype = q_BSHD.dtype if q_BSHD.dtype in DTYPES else torch.float32
    q, k, v = (x.to(dtype) for x in (q_BSHD, k_BSHD, v_BSHD))
    return _Attention.apply(q, k, v, parts, scale).to(q_BSHD.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, parts, scale):
        q, k, v = (_rows(x) for x in (q, k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        _call("attention_forward", (q, k, v), (out, lse), parts, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        plain = torch.contiguous_format
        grads = [torch.empty_like(x, memory_format=plain) for x in (q, k, v)]
        _call(
            "attention_backward", (_rows(grad), q, k, v), (out, lse, *grads), ctx.parts, ctx.scale
        )
        return *grads, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _call(name, strided, contiguous, parts, scale) -> None:
    *_, q, k, _ = strided
    strides = [stride for x in strided for stride in x.stride()[:3]]
    array = (ctypes.c_int64 * len(strides))(*strides)
    rows, most = parts.table.shape[:2]
    lengths = (rows, most, parts.queries, parts.keys, q.shape[2], k.shape[2], q.shape[3])
    table = parts.table.ctypes.data
    figures = (table, array, *lengths, scale, q.dtype)
    library.call(name, q.device, *strided, *contiguous, *figures)
