"""Layers on a few new tokens over their cache, as one call of the compiled kernel (kernels/decode.py).

It computes what layers.py says, for all that a layer can be; where it does not serve, the layers run as
they stand. Letters of shapes: docs/shapes.md.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from megaarch.attention import attend
from megaarch.attention.cpu import bias_by_distance
from megaarch.attention.key_intervals import intervals
from megaarch.config import schema
from megaarch.config.matmuls import head_size, key_heads
from megaarch.kernels import decode as kernel
from megaarch.kernels.bindings import ACTIVATIONS, plain
from megaarch.kernels.rms_norm import RMSNorm
from megaarch.model.kv_cache import Cache
from megaarch.model.layers import Context, Layer, LayerNorm
from megaarch.model.linear import Linear

KERNELS = ("auto", "cpu")  # of attention, whose place this takes


class FewTokens:
    """Layers of a stack, by global index, with the parameters that they have now, for one cache: what it
    keeps is of these."""

    def __init__(self, model: schema.Model, layers: dict[int, Layer], cache: Cache):
        self.layers, self.cache = layers, cache
        self.structures = [_structure(layer) for layer in layers.values()]
        self.alive = [p.detach() for layer in layers.values() for p in layer.parameters()]
        self.step = kernel.Step(
            width=model.hidden_size,
            heads=model.heads,
            key_heads=key_heads(model),
            size=head_size(model),
            feed_forward=model.feed_forward_size,
            pre_norm=model.normalization_position == "pre",
            layer_norm=model.normalization != "rmsnorm",
            activation=ACTIVATIONS[model.activation],
            reach=model.relative_max_distance,
            epsilon=model.normalization_epsilon,
            scale=model.attention_scale or head_size(model) ** -0.5,
        )
        self.bias: torch.Tensor | None = None

    def serves(self, x_BSD: torch.Tensor, context: Context) -> bool:
        """Returns whether it runs these tokens."""
        return (
            x_BSD.shape[0] * x_BSD.shape[1] <= kernel.FEW
            and context.dropout is None
            and kernel.may_run()
            and plain(x_BSD, *(context.rotary or ()), dtypes=kernel.DTYPES)
        )

    def run(self, x_BSD: torch.Tensor, context: Context) -> torch.Tensor:
        """As Transformer.run_layers."""
        step, cache = self.step, self.cache
        rows, tokens = x_BSD.shape[:2]
        step.tokens, step.axes, step.slots = rows * tokens, context.positions.shape[-1], cache.slots
        seen = intervals(context.parts)
        row_BS = np.repeat(np.arange(rows), tokens)
        step.point(row=row_BS, slot=cache.slot_BS, first=seen.first, end=seen.last)
        if context.rotary is not None:
            cos, sin = context.rotary
            step.point(cos=cos, sin=sin)
        if context.bias is not None:
            if self.bias is None:
                self.bias = bias_by_distance(context.bias)
            positions = {"positions": context.positions, "key_positions": cache.positions}
            step.point(bias=self.bias, **positions)
        if context.cross is not None:
            step.point(memory_end=intervals(context.cross).last)
        self._point(x_BSD)
        out_BSD = x_BSD.clone(memory_format=torch.contiguous_format)
        kernel.run(self.structures, step, out_BSD)
        return out_BSD

    def _point(self, x_BSD: torch.Tensor) -> None:
        """Has the structures point to what the cache holds now, with room for the new tokens."""
        step, cache = self.step, self.cache
        like = x_BSD.new_empty(len(x_BSD), 0, step.key_heads, step.size)
        for index, structure in zip(self.layers, self.structures, strict=True):
            held = cache.layer(index).tensors
            held |= {name: cache.grown(held.get(name), like) for name in ("keys", "values")}
            for name, x in held.items():
                setattr(structure, name, x.data_ptr())
            if "memory_keys" in held:
                k, v = held["memory_keys"], held["memory_values"]
                assert k.stride() == v.stride() and k.stride(3) == 1
                step.memory_row, step.memory_key, step.memory_head = k.stride()[:3]


def few_tokens(
    model: schema.Model, modules: nn.ModuleDict, layers: range, cache: Cache
) -> FewTokens | None:
    """Returns what runs a stack's layers over a cache, which keeps it; None where one of them is more than
    layers.py makes it: sharded, compiled, hooked or in another dtype."""
    if layers not in cache.kernels:
        found: dict[int, Any] = {index: modules[str(index)] for index in layers}
        fine = model.attention in KERNELS and all(map(_is_plain, found.values()))
        cache.kernels[layers] = FewTokens(model, found, cache) if fine else None
    return cache.kernels[layers]


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not Layer or not plain(*layer.parameters(), dtypes=kernel.DTYPES):
        return False
    attentions = [x for x in (layer.attention, layer.cross_attention) if x is not None]
    return (
        all(p.is_contiguous() for p in layer.parameters())
        and all(of.attend is attend for of in attentions)
        and all(map(_as_made, layer.modules()))
    )


def _as_made(module: nn.Module) -> bool:
    own = next(module.children(), None) is not None or type(module) in (Linear, RMSNorm, LayerNorm)
    hooks = module._forward_hooks or module._forward_pre_hooks
    return own and not hooks and "forward" not in vars(module)


def _structure(layer: Layer) -> kernel.Layer:
    of = kernel.Parameters.of
    attention, feed_forward = layer.attention, layer.feed_forward
    up = feed_forward.gate_up if feed_forward.gated else feed_forward.up
    made = kernel.Layer(
        attention_norm=of(layer.attention_norm),
        qkv=of(attention.qkv),
        output=of(attention.output),
        feed_forward_norm=of(layer.feed_forward_norm),
        up=of(up),
        down=of(feed_forward.down),
    )
    if cross := layer.cross_attention:
        made.cross_norm = of(layer.cross_attention_norm)
        made.cross_query, made.cross_output = of(cross.q), of(cross.output)
    return made
