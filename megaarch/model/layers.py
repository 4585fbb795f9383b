"""The transformer layer.

Weight layouts are such that a contiguous split of the output rows is a split by heads or channels,
which tensor parallelism needs: queries, keys and values lie per key group [Hkv, (q ... q k v), Dh],
a cross-attention's keys and values [Hkv, (k v), Dh], gate and up [F, (gate up)]. Letters of shapes:
docs/shapes.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megaarch.attention import attend
from megaarch.attention.bias import RelativeBias
from megaarch.attention.mask import Parts
from megaarch.config import schema
from megaarch.config.matmuls import GATED, head_size, key_heads
from megaarch.kernels.bindings import serves
from megaarch.kernels.gated_activation import Gated
from megaarch.kernels.rms_norm import RMSNorm
from megaarch.model.dropout import DropoutKeys, dropout
from megaarch.model.kv_cache import LayerCache
from megaarch.model.linear import Linear
from megaarch.model.positions import heads

ACTIVATIONS = {
    "swiglu": F.silu,  # gated; Shazeer 2020
    "geglu": lambda x: F.gelu(x, approximate="tanh"),  # gated; T5 v1.1's gelu is tanh's
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Context:
    """The inputs that the layers of one stack share in a forward pass.

    parts: self-attention. cross: attention to the memory, or None.
    positions: int64 [B, S, A], of the whole row. rotary: tables of `positions.rotary_tables` for
    the tokens at hand, or None. bias: T5's relative bias, or None. dropout: None where it is off.
    first: slot of the first token at hand. cache: what the layer at hand keeps, in generation.
    """

    parts: Parts
    cross: Parts | None
    positions: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    bias: RelativeBias | None = None
    dropout: DropoutKeys | None = None
    first: int = 0
    cache: LayerCache | None = None


# Takes inputs, outputs, and whether there is a bias: linear.Linear, or what float8.py returns.
MakeLinear = Callable[[int, int, bool], nn.Linear]


def normalization(model: schema.Model) -> nn.Module:
    """Returns RMSNorm or LayerNorm over the width; statistics in fp32."""
    if model.normalization == "rmsnorm":
        fused = "rms_norm" in model.fused_kernels
        return RMSNorm(model.hidden_size, model.normalization_epsilon, fused)
    return LayerNorm(model.hidden_size, model.normalization_epsilon, bias=model.bias)


class LayerNorm(nn.LayerNorm):
    """torch's, in its input's dtype; statistics in fp32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Returns LayerNorm over the last dimension (Ba et al. 2016), in x's dtype."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, epsilon)


def attention_options(model: schema.Model) -> dict[str, Any]:
    """Returns the options of `attend` that the settings give."""
    fused_rows = "rows" in model.fused_kernels
    return {"scale": model.attention_scale, "kernel": model.attention, "fused_rows": fused_rows}


class SelfAttention(nn.Module):
    def __init__(self, model: schema.Model, linear: MakeLinear):
        super().__init__()
        self.head_size = head_size(model)
        self.group = model.heads // key_heads(model)
        self.attend, self.options = attend, attention_options(model)
        fused = key_heads(model) * (self.group + 2) * self.head_size
        self.qkv = linear(model.hidden_size, fused, model.bias)
        self.output = linear(model.heads * self.head_size, model.hidden_size, model.bias)

    def forward(self, x_BSD: torch.Tensor, context: Context) -> torch.Tensor:
        qkv = self.qkv(x_BSD).unflatten(-1, (-1, self.group + 2, self.head_size))
        q, k, v = heads(qkv, context.rotary, axes=context.positions.shape[-1])
        key_positions = context.positions
        if context.cache is not None:
            k, v, key_positions = context.cache.extend(k, v)
        out_BSHDh = self.attend(
            q,
            k,
            v,
            context.parts,
            bias=context.bias,
            query_positions=context.positions,
            key_positions=key_positions,
            **self.options,
        )
        return self.output(out_BSHDh.flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, model: schema.Model, linear: MakeLinear):
        super().__init__()
        self.head_size = head_size(model)
        self.attend, self.options = attend, attention_options(model)
        self.q = linear(model.hidden_size, model.heads * self.head_size, model.bias)
        self.kv = linear(model.hidden_size, key_heads(model) * 2 * self.head_size, model.bias)
        self.output = linear(model.heads * self.head_size, model.hidden_size, model.bias)

    def forward(
        self, x_BSD: torch.Tensor, memory_BTD: torch.Tensor | None, context: Context
    ) -> torch.Tensor:
        """memory: None where the cache has its keys and values."""
        q = self.q(x_BSD).unflatten(-1, (-1, self.head_size))
        k, v = self.keys_values(memory_BTD, context.cache)
        assert context.cross is not None
        return self.output(self.attend(q, k, v, context.cross, **self.options).flatten(2))

    def keys_values(
        self, memory_BTD: torch.Tensor | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns k and v [B, T, Hkv, Dh] of the memory; a cache keeps them."""
        if memory_BTD is None:
            assert cache is not None
            return cache.tensors["memory_keys"], cache.tensors["memory_values"]
        k, v = self.kv(memory_BTD).unflatten(-1, (-1, 2, self.head_size)).unbind(-2)
        if cache is not None:
            cache.tensors |= {"memory_keys": k, "memory_values": v}
        return k, v


class _Pair(torch.autograd.Function):
    """Splits x [..., 2] into two contiguous tensors. On a CPU an activation over every other element does not
    vectorize, and neither does the stack that autograd would put its gradients together with."""

    @staticmethod
    def forward(ctx, x):
        return x[..., 0].contiguous(), x[..., 1].contiguous()

    @staticmethod
    def backward(ctx, first, second):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        grad = first.new_empty(*first.shape, 2)
        grad[..., 0], grad[..., 1] = first, second
        return grad


class FeedForward(nn.Module):
    def __init__(self, model: schema.Model, linear: MakeLinear):
        super().__init__()
        width = model.feed_forward_size
        self.name, self.activation = model.activation, ACTIVATIONS[model.activation]
        self.gated = self.name in GATED
        if self.gated:
            self.gate_up = linear(model.hidden_size, 2 * width, model.bias)
        else:
            self.up = linear(model.hidden_size, width, model.bias)
        self.down = linear(width, model.hidden_size, model.bias)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.down(self.activation(self.up(x_BSD)))
        pair_BSF2 = self.gate_up(x_BSD).unflatten(-1, (-1, 2))
        if serves(pair_BSF2):
            return self.down(Gated.apply(pair_BSF2, self.name))
        gate_BSF, up_BSF = _Pair.apply(pair_BSF2)
        return self.down(self.activation(gate_BSF) * up_BSF)


class Layer(nn.Module):
    """Self-attention, cross-attention if `cross`, and feed-forward: each a residual branch with its
    normalization, before the branch (pre) or after the sum (post)."""

    def __init__(self, model: schema.Model, cross: bool, linear: MakeLinear = Linear):
        super().__init__()
        self.pre = model.normalization_position == "pre"
        self.rate = model.dropout
        self.attention_norm = normalization(model)
        self.attention = SelfAttention(model, linear)
        if cross:
            self.cross_attention_norm = normalization(model)
            self.cross_attention = CrossAttention(model, linear)
        else:
            self.cross_attention = None
        self.feed_forward_norm = normalization(model)
        self.feed_forward = FeedForward(model, linear)

    def forward(
        self,
        x_BSD: torch.Tensor,
        context: Context,
        memory_BTD: torch.Tensor | None = None,
        dropout_key_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps [B, S, D] to [B, S, D]. dropout_key: None where dropout is off."""

        def residual(x, norm, branch, number):
            out = branch(norm(x) if self.pre else x)
            if dropout_key_B is not None:
                out = dropout(out, dropout_key_B, self.rate, number, context.first)
            return x + out if self.pre else norm(x + out)

        x_BSD = residual(x_BSD, self.attention_norm, lambda x: self.attention(x, context), 0)
        if cross := self.cross_attention:
            norm = self.cross_attention_norm
            x_BSD = residual(x_BSD, norm, lambda x: cross(x, memory_BTD, context), 1)
        return residual(x_BSD, self.feed_forward_norm, self.feed_forward, 2)
