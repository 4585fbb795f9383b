"""Counting compute: the one place that turns what was run into FLOPs.

Multiply-adds of matrix products, two FLOPs each, over the exact area of the mask's parts and over
real tokens only: padding is no useful work. Training counts three forward passes, recomputation
never counts.

Legend: d width, H heads, Hkv key heads, Dh head size, f feed-forward, L layers, V vocabulary,
n tokens, P visible (query, key) pairs.
"""

from dataclasses import dataclass

from megaarch import catalogue
from megaarch.data.batch import Counts
from megaarch.settings import Model

TRAINING = 3  # forward + backward (Kaplan et al. 2020, 2.1)
GATED = ("swiglu", "geglu")


def stack_layers(model: Model) -> tuple[int, ...]:
    """Layers of each stack, in the order of the streams."""
    names = catalogue.ARCHITECTURES[model.architecture].streams
    if len(names) == 1:
        return (model.layers,)
    return (model.encoder_layers or model.layers, model.decoder_layers or model.layers)


@dataclass(frozen=True)
class Product:
    """One matrix product of a layer: tokens by weights [inputs, outputs].

    column: tensor parallelism splits its outputs; else its inputs. memory: its tokens are those of the
    stream before. last: the layer ends with it.
    """

    inputs: int
    outputs: int
    column: bool
    memory: bool = False
    last: bool = False


def layer_products(model: Model, stream: int) -> dict[str, Product]:
    """The matrix products of a layer of this stream's stack, in a forward pass, by name. Both kinds of
    attention are named so; what is not attention's is `up` and `down`."""
    d, heads = model.hidden_size, model.heads
    head_size = model.head_size or d // heads
    queries, keys = heads * head_size, (model.kv_heads or heads) * head_size
    inner = model.feed_forward_size
    found = {
        "attention.qkv": Product(d, queries + 2 * keys, column=True),
        "attention.output": Product(queries, d, column=False),
        "up": Product(d, inner * (2 if model.activation in GATED else 1), column=True),
        "down": Product(inner, d, column=False, last=True),
    }
    if stream > 0:
        found["cross_attention.q"] = Product(d, queries, column=True)
        found["cross_attention.kv"] = Product(d, 2 * keys, column=True, memory=True)
        found["cross_attention.output"] = Product(queries, d, column=False)
    return found


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
