"""Queries, keys and values out of a fused projection, turned by RoPE, in one pass each way on a CPU.

Legend: B rows, S tokens, K key heads, G query heads a key head, Dh head size.
"""

import ctypes

import torch

from megaarch.kernels.library import accumulator, call


class Heads(torch.autograd.Function):
    """apply(qkv [B, S, K, G + 2, Dh], cos, signed sin, axes) -> q [B, S, K·G, Dh], k, v
    [B, S, K, Dh]; the tables are `positions.rotary_tables`', any shape of B·S·Dh elements."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, axes):
        qkv, wide = qkv.contiguous(), accumulator(qkv.dtype)
        cos, sin = cos.to(wide).contiguous(), sin.to(wide).contiguous()
        B, S, K, G, Dh = *qkv.shape[:3], qkv.shape[3] - 2, qkv.shape[4]
        q, k, v = (qkv.new_empty(B, S, heads, Dh) for heads in (K * G, K, K))
        call("heads_forward", qkv.device, qkv, cos, sin, q, k, v, B * S, K, G, Dh, axes, qkv.dtype)
        ctx.save_for_backward(cos, sin)
        ctx.axes, ctx.shape = axes, qkv.shape
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        B, S, K, G, Dh = *ctx.shape[:3], ctx.shape[3] - 2, ctx.shape[4]
        grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
        strides = [stride for g in grads for stride in g.stride()[:3]]
        out = grads[0].new_empty(ctx.shape)
        figures = (B, B * S, K, G, Dh, ctx.axes, out.dtype)
        array = (ctypes.c_int64 * 9)(*strides)
        call("heads_backward", out.device, *grads, array, cos, sin, out, *figures)
        return out, None, None, None
