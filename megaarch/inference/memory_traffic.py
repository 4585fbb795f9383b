"""Bytes of a forward pass over a cache: what it reads of weights and of the cache, the activations that
its products read and write, and what the cache holds. As FLOPs (flops.py), they follow from `Counts`.

Each tensor counts once a pass, as if a kernel read it once; norms, activation functions and residual
sums are left out, for they can run inside the products' kernels. Letters of shapes: docs/shapes.md.
"""

from megaarch.config.matmuls import head_size, key_heads, layer_products, stack_layers
from megaarch.config.schema import Model
from megaarch.data.batch import Counts
from megaarch.model.parameter_count import parameter_sizes
from megaarch.model.transformer import padded_vocabulary, stacks

POSITION = 8  # bytes of int64


def memory_traffic(
    model: Model, axes: int, counts: Counts, keys: int, memory: int, element: int
) -> tuple[int, int, int]:
    """Returns the bytes of a pass: of weights, of keys and values that attention reads of the cache, and of
    activations. axes: of positions. keys, memory: cached tokens, and those of the encoder's output, that
    attention of the last stack reads in each row. element: bytes of a number.
    """
    weights = element * _weights(model, axes, counts)
    cache = counts.rows * cache_bytes(model, 0, keys, memory, element)
    return weights, cache, element * _activations(model, counts)


def cache_bytes(model: Model, axes: int, slots: int, memory: int, element: int) -> int:
    """Returns the bytes that a row takes in a `Cache` of so many slots, its positions of `axes` axes
    included, with `memory` tokens of an encoder's output."""
    layers = stack_layers(model)
    token = layers[-1] * 2 * key_heads(model) * head_size(model) * element  # keys and values
    crossed = memory if len(layers) > 1 else 0
    return slots * (token + axes * POSITION) + crossed * token


def _weights(model: Model, axes: int, counts: Counts) -> int:
    """Returns how many parameters a pass reads: those of each stack that has tokens, the rows of
    embeddings that are looked up, and the head where it has targets."""
    ran = {stack.stream: n > 0 for stack, n in zip(stacks(model), counts.tokens, strict=True)}
    stream_of = {str(i): stack.stream for stack in stacks(model) for i in stack.layers}

    def read(name: str) -> bool:
        first, _, rest = name.partition(".")
        second, _, rest = rest.partition(".")
        if first == "layers":
            of_memory = rest.startswith("cross_attention.kv.")
            return counts.tokens[0] > 0 if of_memory else ran[stream_of[second]]
        if first in ("embedding_norm", "relative_bias"):
            return ran[second]
        if first == "encoder_norm":
            return counts.tokens[0] > 0
        if first in ("positions", "segments"):
            return False
        return counts.targets > 0 and (first != "embedding" or model.tied_embedding)

    tables = 1 + axes * (model.position_encoding == "learned") + bool(model.segments)
    rows = tables * sum(counts.tokens) * model.hidden_size
    return rows + sum(size for name, size in parameter_sizes(model, axes).items() if read(name))


def _activations(model: Model, counts: Counts) -> int:
    """Returns how many numbers products and attention read and write, other than weights and what a
    cache holds."""
    width, queries = model.hidden_size, model.heads * head_size(model)
    total = counts.targets * (width + padded_vocabulary(model.vocabulary_size))
    if model.head_transform:
        total += counts.targets * 2 * width
    layers = stack_layers(model)
    for stream, (count, tokens) in enumerate(zip(layers, counts.tokens, strict=True)):
        for product in layer_products(model, stream).values():
            of = counts.tokens[stream - 1] if product.memory else tokens
            total += count * of * (product.inputs + product.outputs)
        attentions = 2 if stream > 0 else 1
        total += count * attentions * tokens * 2 * queries  # queries, and what comes out
        if stream < len(layers) - 1:  # keys and values of an encoder, which no cache holds
            total += count * tokens * 2 * key_heads(model) * head_size(model)
    return total
