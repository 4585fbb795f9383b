"""Queries, keys and values out of a fused projection, turned by RoPE, in one pass each way on a CPU.

Letters of shapes: docs/shapes.md. A key head and its `group` of query heads lie together.
"""

import torch

from megaarch.kernels.bindings import accumulator, call


class Heads(torch.autograd.Function):
    """apply(qkv [B, S, Hkv, group + 2, Dh], cos, signed sin, axes) -> q [B, S, H, Dh], k, v
    [B, S, Hkv, Dh]; the tables are `positions.rotary_tables`', any shape of B·S·Dh elements."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, axes):
        qkv, wide = qkv.contiguous(), accumulator(qkv.dtype)
        cos, sin = cos.to(wide).contiguous(), sin.to(wide).contiguous()
        B, S, Hkv, group, Dh = *qkv.shape[:3], qkv.shape[3] - 2, qkv.shape[4]
        q, k, v = (qkv.new_empty(B, S, heads, Dh) for heads in (Hkv * group, Hkv, Hkv))
        sizes = (B * S, Hkv, group, Dh, axes, qkv.dtype)
        call("heads_forward", qkv.device, qkv, cos, sin, q, k, v, *sizes)
        ctx.save_for_backward(cos, sin)
        ctx.axes, ctx.shape = axes, qkv.shape
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        B, S, Hkv, group, Dh = *ctx.shape[:3], ctx.shape[3] - 2, ctx.shape[4]
        grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
        strides = [stride for g in grads for stride in g.stride()[:3]]
        out = grads[0].new_empty(ctx.shape)
        sizes = (B, B * S, Hkv, group, Dh, ctx.axes, out.dtype)
        call("heads_backward", out.device, *grads, strides, cos, sin, out, *sizes)
        return out, None, None, None
