"""What one rank computes, moves and sends for one micro-batch: counts alone, no speeds.

A layer's work follows its weights: with T ranks of tensor parallelism a product has 1/T of its
columns (or inner size), and every branch of the layer gathers its tokens and scatters them again.

Legend: d width, H heads, Hkv key heads, Dh head size, f feed-forward, V vocabulary, n tokens of a
micro-batch on a rank, T tensor ranks, C context ranks.
"""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

from megaarch.data.batch import Counts
from megaarch.data.packing import HEAD_MULTIPLE
from megaarch.flops import GATED
from megaarch.model.layers import head_size, key_heads
from megaarch.model.transformer import padded_vocabulary, stacks
from megaarch.parallel.stages import overlap
from megaarch.settings import Data, Model, Settings
from megaarch.study.describe import made_up_rows, row_counts

HALF, FULL = 2, 4  # bytes of bf16 and fp32


@dataclass(frozen=True)
class Practice:
    """What differs between stacks of software. The defaults are this one.

    sequence_parallel: tensor ranks share the tokens between products (Korthikanti et al. 2022).
    fused_attention: scores never reach memory, and masked tiles are skipped.
    logits_again: the head's backward pass computes the logits again.
    gradient_bytes: of one gradient when it is reduced.
    """

    sequence_parallel: bool = True
    fused_attention: bool = True
    logits_again: bool = True
    gradient_bytes: int = FULL


OURS = Practice()


@dataclass(frozen=True)
class Work:
    """Of a forward pass. products: (m, n, k) of matrix products, each with how many of it.
    moved: bytes through the GPU's memory besides the products'. attention: (FLOPs over visible
    pairs, tokens of the row). sent: bytes that a rank sends to its tensor-parallel and exchanged: to
    its context-parallel peers."""

    products: tuple[tuple[int, int, int, float], ...] = ()
    moved: float = 0.0
    attention: tuple[tuple[float, float], ...] = ()
    sent: float = 0.0
    exchanged: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.moved + other.moved,
            self.attention + other.attention,
            self.sent + other.sent,
            self.exchanged + other.exchanged,
        )

    @property
    def flops(self) -> float:
        """FLOPs of the products."""
        return sum(2.0 * m * n * k * count for m, n, k, count in self.products)


@dataclass(frozen=True)
class Row:
    """The mean row of a run. slots: of each stream, padding with it. counts: of `rows` rows."""

    slots: tuple[int, ...]
    counts: Counts

    @property
    def targets(self) -> float:
        """Targets of one row."""
        return self.counts.targets / self.counts.rows

    def pairs(self, stream: int) -> float:
        """Visible pairs of a stream's self-attention in one row."""
        return self.counts.areas[stream] / self.counts.rows

    def cross_pairs(self, stream: int) -> float:
        """Visible pairs of a stream's attention to the one before it, in one row."""
        return self.counts.cross_areas[stream] / self.counts.rows


@lru_cache(maxsize=256)
def _row(model: Model, data: str) -> Row:
    counts, _ = row_counts(model, *made_up_rows(model, Data.model_validate_json(data)))
    return Row(tuple(slots // counts.rows for slots in counts.slots), counts)


def row(settings: Settings) -> Row:
    """The mean row of these settings, from made-up text, stretched to what the layout divides."""
    parallel = settings.parallel
    found = _row(settings.model, settings.data.model_dump_json())
    shards = parallel.tensor_parallel * parallel.context_parallel
    return replace(found, slots=tuple(-(-n // shards) * shards for n in found.slots))


@dataclass(frozen=True)
class Layers:
    """Work of one layer of a stack, of the head and of an embedding, in a layout."""

    settings: Settings
    practice: Practice = OURS
    row: Row = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "row", row(self.settings))

    def tokens(self, stream: int) -> int:
        """Of a micro-batch, between products gathered over tensor ranks."""
        training, parallel = self.settings.training, self.settings.parallel
        return training.micro_batch_size * self.row.slots[stream] // parallel.context_parallel

    def layer(self, stream: int) -> Work:
        """A layer of the stack of this stream."""
        model, tensor = self.settings.model, self.settings.parallel.tensor_parallel
        d, f, n = model.hidden_size, model.feed_forward_size, self.tokens(stream)
        gated = model.activation in GATED
        queries = model.heads * head_size(model)
        keys = key_heads(model) * head_size(model)
        inner = f // tensor
        products = [
            (n, (queries + 2 * keys) // tensor, d, 1),
            (n, d, queries // tensor, 1),
            (n, (1 + gated) * inner, d, 1),
            (n, d, inner, 1),
        ]
        branches, gathered = 2, 2 * n
        work = self._attention(stream, self.row.slots[stream], self.row.pairs(stream))
        exchanged = n * 2 * (queries + keys)
        if stream > 0:
            memory = self.tokens(stream - 1)
            products += [
                (n, queries // tensor, d, 1),
                (memory, 2 * keys // tensor, d, 1),
                (n, d, queries // tensor, 1),
            ]
            branches, gathered = 3, 3 * n + memory / 2
            pairs = self.row.cross_pairs(stream)
            work += self._attention(stream, self.row.slots[stream - 1], pairs)
            exchanged += 2 * (n * queries + memory * keys)
        shared = tensor if self.practice.sequence_parallel else 1
        moved = branches * 10 * n * d / shared  # norm: 2 numbers an element; residual sum: 3
        moved += n * inner * (18 if gated else 4)
        if model.position_encoding == "rope":
            moved += 4 * n * (queries + keys) / tensor
        context = self.settings.parallel.context_parallel
        return work + Work(
            tuple(products),
            moved,
            sent=gathered * d * HALF * 2 * (tensor - 1) / tensor,
            exchanged=HALF * exchanged / tensor * (context - 1) / context,
        )

    def _attention(self, stream: int, keys: int, pairs: float) -> Work:
        """Of one layer, over rows of `keys` keys and `pairs` visible pairs."""
        model, parallel = self.settings.model, self.settings.parallel
        rows = self.settings.training.micro_batch_size
        heads = rows * model.heads / (parallel.tensor_parallel * parallel.context_parallel)
        size, queries = head_size(model), self.row.slots[stream]
        if self.practice.fused_attention and model.position_encoding != "relative":
            return Work(attention=((4 * heads * size * pairs, keys),))
        # every score is written and read: by both products, softmax, its mask or bias, dropout
        return Work(
            ((queries, keys, size, heads), (queries, size, keys, heads)),
            moved=9 * heads * queries * keys,
        )

    def head(self) -> Work:
        """Output layer and loss, on rows of targets."""
        model, parallel = self.settings.model, self.settings.parallel
        rows = self.settings.training.micro_batch_size * self.row.targets
        rows = math.ceil(rows / parallel.context_parallel / HEAD_MULTIPLE) * HEAD_MULTIPLE
        columns = padded_vocabulary(model.vocabulary_size) // parallel.tensor_parallel
        n, d, tensor = self.tokens(-1), model.hidden_size, parallel.tensor_parallel
        products = [(rows, columns, d, 1)]
        if model.head_transform:
            products.append((rows, d, d, 1))
        sent = n * d * HALF * (tensor - 1) / tensor
        return Work(tuple(products), moved=12 * rows * columns, sent=sent)

    def embedding(self, stream: int) -> Work:
        """A stack's lookup."""
        model, tensor = self.settings.model, self.settings.parallel.tensor_parallel
        n, d = self.tokens(stream), model.hidden_size
        return Work(moved=6 * n * d, sent=n * d * HALF * (tensor - 1) / tensor)

    def contents(self, layers: range) -> tuple[tuple[tuple[int, bool], ...], bool]:
        """Of a pipeline stage: for each stack how many layers it has and whether it begins there;
        and whether the head is its."""
        model = stacks(self.settings.model)
        mine = tuple(
            (len(overlap(stack.layers, layers)), stack.layers.start in layers) for stack in model
        )
        return mine, layers.stop == model[-1].layers.stop

    def stage(self, layers: range) -> tuple[Work, Work]:
        """The layers of a pipeline stage with the embeddings that they begin with; and, apart, the
        head, if the stage ends with it."""
        mine, ends = self.contents(layers)
        found = Work()
        for stream, (count, begins) in enumerate(mine):
            if begins:
                found += self.embedding(stream)
            found += times(self.layer(stream), count)
        return found, self.head() if ends else Work()


def times(work: Work, count: int) -> Work:
    """`work` so many times over."""
    return Work(
        tuple((m, n, k, c * count) for m, n, k, c in work.products) if count else (),
        work.moved * count,
        tuple((flops * count, length) for flops, length in work.attention) if count else (),
        work.sent * count,
        work.exchanged * count,
    )
