"""What one rank computes, moves and sends for one micro-batch: counts alone, no speeds.

A layer's work follows its weights: with T ranks of tensor parallelism a product has 1/T of its
columns (or inner size), and every branch of the layer gathers its tokens and scatters them again.

Legend: d width, H heads, Hkv key heads, Dh head size, f feed-forward, V vocabulary, n tokens of a
micro-batch on a rank, T tensor ranks, C context ranks.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megaarch.config.cached import cached
from megaarch.config.matmuls import GATED, head_size, key_heads, layer_products
from megaarch.config.schema import Data, Model, Settings
from megaarch.data.batch import Counts
from megaarch.data.packing import HEAD_MULTIPLE
from megaarch.model.loss import ACCELERATOR, rows_of_chunk
from megaarch.model.transformer import padded_vocabulary, stacks
from megaarch.parallel.stages import overlap
from megaarch.planner.software_stacks import OURS, Bytes, Software
from megaarch.study.describe import made_up_rows, row_counts

HALF, FULL = 2, 4  # bytes of bf16 and fp32
# A tensor is read for its largest number and again to be cast, and turned for the product that needs
# it by columns, after it is gathered; a weight is cast for each direction (torchao, roofline_utils.py).
# With a scale for each row, columns have others, so that what is not turned is cast again.
FLOAT8_CAST = 5
FLOAT8_TURN = {"tensorwise": 2, "rowwise": FLOAT8_CAST}
FLOAT8_WEIGHT = {"tensorwise": Bytes(5, 3), "rowwise": Bytes(5, 5)}
NOTHING = Bytes()


class Matmul(NamedTuple):
    """A matrix product [m, k] by [k, n], on one tensor rank, `count` times. sent: bytes that the rank
    sends to its peers, to gather the product's tokens if it `gathers`, else to scatter them. last: a
    layer ends with it."""

    m: int
    n: int
    k: int
    count: float = 1
    sent: float = 0.0
    gathers: bool = False
    last: bool = False


@dataclass(frozen=True)
class Work:
    """The work of a micro-batch. products: of a forward pass. attention: (FLOPs over visible pairs, tokens of
    the row), forward. moved: bytes through the GPU's memory besides the products', launches: kernels,
    in each direction. sent: bytes that a rank sends to its tensor-parallel peers beside no product,
    exchanged: to its context-parallel ones, forward."""

    products: tuple[Matmul, ...] = ()
    attention: tuple[tuple[float, float], ...] = ()
    moved: Bytes = NOTHING
    launches: Bytes = NOTHING
    sent: float = 0.0
    exchanged: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(mine + theirs for mine, theirs in both))

    def times(self, count: int) -> "Work":
        """The same so many times over."""
        return Work(
            tuple(product._replace(count=product.count * count) for product in self.products),
            tuple((flops * count, length) for flops, length in self.attention),
            self.moved * count,
            self.launches * count,
            self.sent * count,
            self.exchanged * count,
        )


@cached(256)
def _counts(model: Model, data: str) -> Counts:
    return row_counts(model, *made_up_rows(model, Data.model_validate_json(data)))[0]


@dataclass(frozen=True)
class Layers:
    """Work of one layer of a stack, of the head and of an embedding, in a layout."""

    settings: Settings
    software: Software = OURS

    @cached_property
    def counts(self) -> Counts:
        """Of `rows` rows of made-up text."""
        return _counts(self.settings.model, self.settings.data.model_dump_json())

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Of each stream of a row, padding with it: stretched to what the layout divides."""
        parallel, rows = self.settings.parallel, self.counts.rows
        shards = parallel.tensor_parallel * parallel.context_parallel
        return tuple(-(-(slots // rows) // shards) * shards for slots in self.counts.slots)

    def tokens(self, stream: int) -> int:
        """Returns the tokens of a micro-batch on one context-parallel rank; tensor ranks gather all of them."""
        training, parallel = self.settings.training, self.settings.parallel
        return training.micro_batch_size * self.slots[stream] // parallel.context_parallel

    def received(self, start: int) -> float:
        """Returns the bytes of the tensors that a stage whose first layer is `start` receives: hidden states,
        and behind the encoder its output too."""
        streams = (start > 0) + (start > stacks(self.settings.model)[0].layers.stop)
        tokens = sum(self.tokens(stream) for stream in range(streams))
        width = self.settings.model.hidden_size / self.settings.parallel.tensor_parallel
        return HALF * tokens * width

    def products(self, stream: int) -> list[Matmul]:
        """Returns the products of a layer of this stream's stack with its weights."""
        tensor = self.settings.parallel.tensor_parallel
        found = []
        for product in layer_products(self.settings.model, stream).values():
            m, n, k = self.tokens(stream - product.memory), product.outputs, product.inputs
            split = (m, n // tensor, k) if product.column else (m, n, k // tensor)
            size = 1 if product.column and self.software.float8_messages else HALF
            shared = product.memory and self.software.shares_memory  # a stage gathers it once
            sent = 0.0 if shared else self._gathered(m) * size / HALF
            found.append(Matmul(*split, 1, sent, product.column, product.last))
        return found

    def layer(self, stream: int) -> Work:
        """A layer of the stack of this stream."""
        parallel = self.settings.parallel
        tensor, context = parallel.tensor_parallel, parallel.context_parallel
        products = self.products(stream)
        work = self._attention(stream, stream, self.counts.areas)
        if stream > 0:
            work += self._attention(stream, stream - 1, self.counts.cross_areas)
        kernels = len(products) + len(work.attention)
        return work + Work(
            tuple(products),
            moved=self._elementwise(stream, products),
            launches=self.software.traffic.launches + Bytes(kernels, 2 * kernels),
            exchanged=HALF * self._exchanged(stream) / tensor * (context - 1) / context,
        )

    def _elementwise(self, stream: int, products: list[Matmul]) -> Bytes:
        """Bytes that a layer's kernels other than products and attention move."""
        model, tensor = self.settings.model, self.settings.parallel.tensor_parallel
        n, traffic = self.tokens(stream), self.software.traffic
        branches, gated = 2 + (stream > 0), model.activation in GATED
        width = branches * n * model.hidden_size
        width /= tensor if self.software.sequence_parallel else 1
        hidden = traffic.gate if gated else traffic.activation
        moved = traffic.norm * width + traffic.residual * width
        moved += hidden * (n * model.feed_forward_size // tensor)
        if model.position_encoding == "rope":
            turned = (model.heads + key_heads(model)) * head_size(model)
            moved += traffic.rope * (n * turned / tensor)
        if recipe := self.software.float8:
            shares = tensor if self.software.float8_messages else 1  # cast before a gather
            turn = FLOAT8_TURN[recipe]
            for product in products:
                m, n, k = product[:3]
                taken, given = (shares, 1) if product.gathers else (1, shares)
                moved += Bytes(FLOAT8_CAST / taken, turn) * (m * k)
                moved += Bytes(0, FLOAT8_CAST / given + turn) * (m * n)
                moved += FLOAT8_WEIGHT[recipe] * (n * k)
        return moved

    def _exchanged(self, stream: int) -> float:
        """Numbers that context ranks pass on, before tensor parallelism: queries, keys, values and
        outputs of an all-to-all, or keys and values of a ring."""
        model, n = self.settings.model, self.tokens(stream)
        queries, keys = (h * head_size(model) for h in (model.heads, key_heads(model)))
        passed = 0 if self.software.ring_context else 2 * queries
        found = n * (passed + 2 * keys)
        if stream > 0:
            found += n * passed + 2 * self.tokens(stream - 1) * keys
        return found

    def _attention(self, stream: int, seen: int, areas: tuple[int, ...]) -> Work:
        """Returns the attention of one layer to the stream `seen`. areas: visible pairs, per stream."""
        model, parallel = self.settings.model, self.settings.parallel
        rows = self.settings.training.micro_batch_size
        heads = rows * model.heads / (parallel.tensor_parallel * parallel.context_parallel)
        size, queries, keys = head_size(model), self.slots[stream], self.slots[seen]
        pairs = areas[stream] / self.counts.rows
        if self.software.attention != "scores" and model.position_encoding != "relative":
            return Work(attention=((4 * heads * size * pairs, keys),))
        # every score is written and read: by both products, softmax, its mask or bias, dropout
        return Work(
            (Matmul(queries, keys, size, heads), Matmul(queries, size, keys, heads)),
            moved=Bytes(9, 18) * (heads * queries * keys),
        )

    def head(self) -> Work:
        """Output layer and loss, on rows of targets."""
        model, parallel = self.settings.model, self.settings.parallel
        rows = self.settings.training.micro_batch_size * (self.counts.targets / self.counts.rows)
        rows = math.ceil(rows / parallel.context_parallel / HEAD_MULTIPLE) * HEAD_MULTIPLE
        columns = padded_vocabulary(model.vocabulary_size) // parallel.tensor_parallel
        d, sent = model.hidden_size, self._gathered(self.tokens(-1))
        products = [Matmul(rows, columns, d, 1, sent, True)]
        if model.head_transform:
            products.append(Matmul(rows, d, d))
        return Work(tuple(products), moved=self.software.traffic.logit * (rows * columns))

    def logits_again(self) -> float:
        """Returns the share of the logits that the head's backward pass computes again: the chunks whose slopes
        the loss has no room for (model/loss.py)."""
        rows, columns = self.head().products[0][:2]
        chunk = rows_of_chunk(ACCELERATOR, columns)
        kept = ACCELERATOR.kept // (HALF * chunk * columns) * chunk
        return max(0.0, 1 - kept / rows)

    def embedding(self, stream: int) -> Work:
        """A stack's lookup."""
        n, d = self.tokens(stream), self.settings.model.hidden_size
        return Work(moved=Bytes(6 * n * d, 12 * n * d), sent=self._gathered(n))

    def _gathered(self, tokens: int) -> float:
        """Returns the bytes that a rank sends when tensor ranks gather so many tokens, or scatter them."""
        tensor = self.settings.parallel.tensor_parallel
        return HALF * tokens * self.settings.model.hidden_size * (tensor - 1) / tensor

    def contents(self, layers: range) -> tuple[tuple[tuple[int, bool], ...], bool]:
        """Returns what a pipeline stage of these layers holds: for each stack how many layers, and whether the
        stack begins there; and whether it holds the head."""
        model = stacks(self.settings.model)
        mine = tuple(
            (len(overlap(stack.layers, layers)), stack.layers.start in layers) for stack in model
        )
        return mine, layers.stop == model[-1].layers.stop

    def stage(self, mine: tuple[tuple[int, bool], ...], ends: bool) -> tuple[Work, Work]:
        """The layers of a pipeline stage of these `contents` with the embeddings that they begin with; and,
        apart, the head, if the stage ends with it."""
        found = Work()
        for stream, (count, begins) in enumerate(mine):
            if begins:
                found += self.embedding(stream)
            found += self.layer(stream).times(count)
            if stream > 0 and count and self.software.shares_memory:
                found += Work(sent=self._gathered(self.tokens(stream - 1)))
        return found, self.head() if ends else Work()
