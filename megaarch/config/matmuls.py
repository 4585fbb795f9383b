"""The matrix products of a layer, as its settings give them: what FLOPs, time, memory and checks of
widths are counted from.

Legend: d width, H heads, Hkv key heads, Dh head size, f feed-forward.
"""

from dataclasses import dataclass

from megaarch.config import catalogue
from megaarch.config.schema import Model

GATED = ("swiglu", "geglu")


def key_heads(model: Model) -> int:
    """Returns how many heads of keys and values a layer has."""
    return model.kv_heads or model.heads


def head_size(model: Model) -> int:
    """Returns the width of a head."""
    return model.head_size or model.hidden_size // model.heads


def stack_layers(model: Model) -> tuple[int, ...]:
    """Returns the number of layers of each stack, in the order of the streams."""
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
    """Returns the matrix products of a layer of this stream's stack, in a forward pass, by name.
    Both kinds of attention are named so; what is not attention's is `up` and `down`."""
    d, inner = model.hidden_size, model.feed_forward_size
    queries, keys = (heads * head_size(model) for heads in (model.heads, key_heads(model)))
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
