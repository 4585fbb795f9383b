"""Counting compute: the one place that turns what was run into FLOPs.

Multiply-adds of matrix products, two FLOPs each, over the exact area of the mask's parts and over
real tokens only: padding is no useful work. Training counts three forward passes, recomputation
never counts.

Legend: d width, H heads, Hkv key heads, Dh head size, f feed-forward, L layers, V vocabulary,
n tokens, P visible (query, key) pairs.
"""

from dataclasses import dataclass

from megaarch.config.products import layer_products, stack_layers
from megaarch.config.schema import Model
from megaarch.data.batch import Counts

TRAINING = 3  # forward + backward (Kaplan et al. 2020, 2.1)


@dataclass(frozen=True)
class Forward:
    """FLOPs of one forward pass by where they are spent."""

    projections: int  # Q, K, V, O of self- and cross-attention
    feed_forward: int
    attention: int  # QK^T and PV over the visible pairs
    head: int

    @property
    def total(self) -> int:
        return self.projections + self.feed_forward + self.attention + self.head


def forward(model: Model, counts: Counts) -> Forward:
    """FLOPs of one forward pass over a batch that holds `counts`."""
    d, heads = model.hidden_size, model.heads
    head_size = model.head_size or d // heads
    projections = blocks = pairs = 0
    for s, layers in enumerate(stack_layers(model)):
        for name, product in layer_products(model, s).items():
            tokens = counts.tokens[s - 1 if product.memory else s]
            count = 2 * layers * tokens * product.inputs * product.outputs
            if name in ("up", "down"):
                blocks += count
            else:
                projections += count
        pairs += layers * (counts.areas[s] + counts.cross_areas[s])
    head = 2 * counts.targets * d * model.vocabulary_size
    if model.head_transform:
        head += 2 * counts.targets * d * d
    return Forward(projections, blocks, 4 * heads * head_size * pairs, head)


def training(model: Model, counts: Counts) -> int:
    """Exact training FLOPs of a batch that holds `counts`: the unit of every budget and MFU."""
    return TRAINING * forward(model, counts).total


def palm(model: Model, counts: Counts, parameters: int) -> float:
    """Training FLOPs by the convention of PaLM (Chowdhery et al. 2022, appendix B).

    (6N + 12·L·H·Q·T) a token: every parameter on every token, every mask dense. For comparison
    with papers only: it is wrong for encoder-decoders, whose stacks see different tokens.
    """
    d, heads = model.hidden_size, model.heads
    head_size = model.head_size or d // heads
    total = 0.0
    for s, layers in enumerate(stack_layers(model)):
        length = counts.slots[s] / counts.rows
        total += (6 * parameters + 12 * layers * heads * head_size * length) * counts.tokens[s]
    return total
