"""Models of the house that read examples (x, y) of a linear function in place of tokens.

A token is an example (x, y) or a query (x, 0), as in von Oswald et al. 2023; queries see examples alone. n
examples and Q queries, e (an example) and q (a query) written out:

    causal_decoder    row e .. e q .. q            C[0:n; 0:n], R[n:n+Q; 0:n]
    prefix_decoder    row e .. e q .. q            R[0:n; 0:n], R[n:n+Q; 0:n]
    encoder_decoder   encoder e .. e, decoder q    R[0:n; 0:n], R[i; i] of each query, cross R[0:Q; 0:n]

There are no positions. Letters of shapes: docs/shapes.md; X is the dimensions of x.
"""

from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import nn

from megaarch.attention.mask import Parts, causal, full
from megaarch.config import schema
from megaarch.model.initialize import initial_value, initialize
from megaarch.model.layers import Context, Layer
from megaarch.model.linear import Linear
from megaarch.model.transformer import Transformer

Architecture = Literal["causal_decoder", "prefix_decoder", "encoder_decoder"]
Attention = Literal["softmax", "linear"]


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: Parts, *, divisor: int, **options: Any
) -> torch.Tensor:
    """Returns attention without softmax, [B, Sq, H, Dh]: the sum of (q·k) v over the keys that a query
    sees, over `divisor`. The other options of `attend` change nothing."""
    seen_BQK = parts.plan("dense", lambda made: torch.from_numpy(made.dense())).to(q)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * seen_BQK[:, None] / divisor
    return torch.einsum("bhqk,bkhd->bqhd", scores, v)


class NoBranch(nn.Module):
    """A residual branch that adds nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class Regressor(nn.Module):
    """A stack of the house, or two, between linear maps of its own.

    softmax: whole layers. linear: self- and cross-attention alone, without softmax, norms and
    feed-forward, which is the model of von Oswald's and Ding's theory; `divisor` is that of its sums.
    """

    def __init__(
        self,
        model: schema.Model,
        attention: Attention,
        dimensions: int,
        divisor: int,
        seed: int = 0,
    ):
        super().__init__()
        self.transformer = Transformer(model)
        initialize(self.transformer, seed)
        del self.transformer.embedding  # there are no ids
        self.read_in = Linear(dimensions + 1, model.hidden_size, bias=False)
        self.read_out = Linear(model.hidden_size, 1, bias=False)
        with torch.no_grad():
            for name in ("read_in", "read_out"):
                weight = getattr(self, name).weight
                drawn = initial_value(f"{name}.weight", tuple(weight.shape), model, seed)
                weight.copy_(drawn / model.initial_deviation * weight.shape[1] ** -0.5)
        if attention == "linear":
            for layer in self.transformer.layers.values():
                _attention_alone(layer, divisor)

    def forward(
        self, x_BSX: torch.Tensor, y_BS: torch.Tensor, x_BQX: torch.Tensor, every: bool = False
    ) -> torch.Tensor:
        """Returns the predictions [B, Q] at the queries `x_BQX`, of the examples (x, y).

        every: query i of a causal decoder sees the first (i + 1) S / Q examples, rounded up.
        """
        model, (rows, n), queries = self.transformer, y_BS.shape, x_BQX.shape[1]
        given = self.read_in(torch.cat([x_BSX, y_BS[..., None]], 2))
        asked = self.read_in(torch.cat([x_BQX, torch.zeros_like(x_BQX[..., :1])], 2))
        contexts = contexts_of(model.settings.architecture, rows, n, queries, every)
        if len(model.stacks) == 1:
            hidden = torch.cat([given, asked], 1)
            hidden = model.run_layers(hidden, contexts[0], model.stacks[0].layers)[:, n:]
        else:
            encoder, decoder = (stack.layers for stack in model.stacks)
            memory = model.to_memory(model.run_layers(given, contexts[0], encoder))
            hidden = model.run_layers(asked, contexts[1], decoder, memory)
        return self.read_out(model.before_output(hidden))[..., 0]

    @property
    def count(self) -> int:
        """Its parameters."""
        return sum(p.numel() for p in self.parameters())


@lru_cache(maxsize=256)
def contexts_of(
    architecture: str, rows: int, n: int, queries: int, every: bool = False
) -> tuple[Context, ...]:
    """Returns the context of each stack: the masks above, and positions that nothing reads."""

    def context(length: int, parts: list[tuple[int, ...]], cross: Parts | None = None) -> Context:
        positions = torch.zeros(rows, length, 1, dtype=torch.int64)
        return Context(Parts.of([parts] * rows, length, length), cross, positions)

    if architecture == "encoder_decoder":
        cross = Parts.of([[full(0, queries, 0, n)]] * rows, queries, n)
        alone = [full(i, i + 1, i, i + 1) for i in range(queries)]
        return context(n, [full(0, n, 0, n)]), context(queries, alone, cross)
    shape = causal if architecture == "causal_decoder" else full
    asked = [full(n, n + queries, 0, n)]
    if every:
        seen = [-(-(i + 1) * n // queries) for i in range(queries)]
        asked = [full(n + i, n + i + 1, 0, seen[i]) for i in range(queries)]
    return (context(n + queries, [shape(0, n, 0, n), *asked]),)


def _attention_alone(layer: nn.Module, divisor: int) -> None:
    assert isinstance(layer, Layer)
    layer.attention.attend = partial(linear_attention, divisor=divisor)
    layer.attention_norm = layer.feed_forward_norm = nn.Identity()
    layer.add_module("feed_forward", NoBranch())
    if layer.cross_attention is not None:
        layer.cross_attention.attend = partial(linear_attention, divisor=divisor)
        layer.cross_attention_norm = nn.Identity()
