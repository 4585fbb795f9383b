"""Counting compute: the one place that turns what was run into FLOPs.

Multiply-adds of matrix products, two FLOPs each, over the exact area of the mask's parts and over
real tokens only: padding is no useful work. Training counts three forward passes, recomputation
never counts.

Which products a layer has stands in config/matmuls.py.
"""

from dataclasses import astuple, dataclass
from operator import add

from megaarch.config.matmuls import head_size, layer_products, stack_layers
from megaarch.config.schema import Model
from megaarch.data.batch import Counts

TRAINING = 3  # forward + backward (Kaplan et al. 2020, 2.1)


@dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass by where they are spent."""

    projections: int  # Q, K, V, O of self- and cross-attention
    feed_forward: int
    attention: int  # QK^T and PV over the visible pairs
    head: int

    @property
    def total(self) -> int:
        return self.projections + self.feed_forward + self.attention + self.head

    def __add__(self, other: "Forward") -> "Forward":
        return Forward(*map(add, astuple(self), astuple(other)))


def forward(model: Model, counts: Counts) -> Forward:
    """Returns the FLOPs of one forward pass over a batch that holds `counts`."""
    width, vocabulary = model.hidden_size, model.vocabulary_size
    head = width * vocabulary + (width * width if model.head_transform else 0)
    total = Forward(0, 0, 0, 2 * counts.targets * head)
    for stream, layers in enumerate(stack_layers(model)):
        total += layer(model, stream, counts, layers)
    return total


def layer(model: Model, stream: int, counts: Counts, layers: int = 1) -> Forward:
    """Returns the FLOPs of so many layers of a stream's stack in a forward pass."""
    projections = feed_forward = 0
    for name, product in layer_products(model, stream).items():
        tokens = counts.tokens[stream - 1 if product.memory else stream]
        count = 2 * layers * tokens * product.inputs * product.outputs
        if name in ("up", "down"):
            feed_forward += count
        else:
            projections += count
    pairs = layers * (counts.areas[stream] + counts.cross_areas[stream])
    return Forward(projections, feed_forward, 4 * model.heads * head_size(model) * pairs, 0)


def training(model: Model, counts: Counts) -> int:
    """Returns the exact training FLOPs of a batch that holds `counts`: the unit of budgets and MFU."""
    return TRAINING * forward(model, counts).total


def palm(model: Model, counts: Counts, parameters: int) -> float:
    """Returns training FLOPs by the convention of PaLM (Chowdhery et al. 2022, appendix B).

    (6N + 12·L·H·Q·T) a token: every parameter on every token, every mask dense. For comparison
    with papers only: it is wrong for encoder-decoders, whose stacks see different tokens.
    """
    attended = model.heads * head_size(model)
    total = 0.0
    for stream, layers in enumerate(stack_layers(model)):
        length = counts.slots[stream] / counts.rows
        total += (6 * parameters + 12 * layers * attended * length) * counts.tokens[stream]
    return total
