"""Rows of documents that do not see each other (`data.document_masks`).

An example is a document, or a piece of one that is longer than a row takes. Pieces share rows, the
longest first, by the bound on what each takes; as every example has parts and positions of its own,
nothing is seen or predicted across the end of a document.

    documents  a a a a a a a | b b | c c c       rows of 5 tokens
    pieces     a a a a a   a a   b b   c c c
    rows       a a a a a | c c c a a | b b . . .

Rows are planned for each epoch from the documents' lengths alone, in 12 bytes of memory a piece; a plan
keeps 8.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megaarch.config.schema import Model
from megaarch.data.bin_packing import pack_classes
from megaarch.data.example import (
    Converted,
    Converter,
    Objective,
    Rng,
    RowShape,
    SplitObjective,
    Vocabulary,
    generator,
)
from megaarch.data.row_lengths import Mixed, fixed_shape, pair_shape
from megaarch.errors import UserError

ORDER = 0xD0C5  # keeps the generators of orders apart from those of noise
SHORTEST = 2  # tokens of an example: of one alone there is nothing to learn
LONG = 16  # longest pieces of the text that a component of a mixture reads at a time
BLOCK = 1 << 16  # documents that are cut at a time
GOLDEN = (5**0.5 - 1) / 2
SizeOf = Callable[[int, int, bool], list[int]]


@dataclass(frozen=True)
class Kind:
    """What pieces become. share: of all pieces. raw: tokens of the longest. mirrored: the objective of
    the second of two pieces that share a draw, so that they fill both streams together; None: each
    piece stands alone."""

    share: float
    raw: int
    objective: Objective
    mirrored: Objective | None = None


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, each an entry of these int [N] arrays."""

    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    kind: np.ndarray

    def __getitem__(self, index: np.ndarray) -> "Pieces":
        return Pieces(*(array[index] for array in vars(self).values()))


def permutation(rng: Rng, size: int) -> np.ndarray:
    """Draws what `rng.permutation(size)` does, in 32 bits where they do."""
    order = np.arange(size, dtype=np.uint32 if size < 1 << 32 else np.int64)
    rng.shuffle(order)
    return order


def kinds_of(plans: Mixed) -> list[Kind]:
    """Returns the kinds of pieces that these rows' segments stand for."""
    kinds = []
    for share, plan in plans:
        if plan.mirrored:
            kinds.append(Kind(2 * share, plan.raw, *plan.objectives))
        else:
            kinds += [Kind(share, plan.raw, objective) for objective in plan.objectives]
    return kinds


def cut(
    lengths: np.ndarray, documents: np.ndarray, kinds: list[Kind], draw: float
) -> Iterator[Pieces]:
    """Yields pieces that hold every token of `documents` once, of BLOCK documents at a time. Each kind gets
    its share of the pieces of any long text, and of all documents that no kind has to cut.

    lengths: int [D] of all documents. draw: in [0, 1), where kinds begin to alternate.
    """
    raws, texts = np.array([kind.raw for kind in kinds]), 0
    for begin in range(0, len(documents), BLOCK):
        block = documents[begin : begin + BLOCK]
        whole = lengths[block].astype(np.int64)
        text, start, length = _split(whole, np.full(len(whole), LONG * raws.max()))
        weights = np.array([kind.share for kind in kinds]) / -(-length[:, None] // raws)
        edges = np.cumsum(weights, axis=1)
        numbers = np.arange(texts, texts + len(length))
        texts += len(length)
        drawn = (draw + GOLDEN * numbers) % 1  # even, whatever their number
        kind = (drawn[:, None] * edges[:, -1:] >= edges[:, :-1]).sum(axis=1)
        piece, offset, length = _split(length, raws[kind])
        yield Pieces(block[text[piece]], start[piece] + offset, length, kind[piece])


def _split(lengths: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts each range into pieces of `most` tokens and a shorter one at its end; returns (range,
    offset in it, length) of each. A last token alone gets one of the piece before it, or shares that where
    pieces have two."""
    counts = -(-lengths // most)
    index = np.repeat(np.arange(len(lengths)), counts)
    place = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = place * most[index]
    ends = np.minimum(starts + most[index], lengths[index])
    alone = np.flatnonzero((ends - starts < SHORTEST) & (place > 0))
    starts[alone] -= 1
    ends[alone - 1] -= most[index[alone]] > SHORTEST
    return index, starts, ends - starts


class EpochPlan:
    """The rows of one epoch: which pieces stand in each.

    Pieces stand by kind, the longest first. Those of one kind and length are a run, whose number tells
    both, so that of a piece its document and offset are kept.
    """

    def __init__(
        self, lengths: np.ndarray, kinds: list[Kind], size_of: SizeOf, limit: np.ndarray, rng: Rng
    ):
        """lengths: int [documents]. size_of: a bound on what an item takes of a row, int [D], of its kind,
        the length of its first piece, and whether there is a second. limit: int [D], what a row has."""
        self._runs = np.cumsum([kind.raw for kind in kinds])  # of each kind and those before it
        self._place(lengths, kinds, rng)
        self._begins, self._widths = self._classes(kinds)
        first, paired = self._found(self._begins), self._widths == 2
        keys = zip(first.kind.tolist(), first.length.tolist(), paired.tolist(), strict=True)
        sizes = np.array([size_of(*key) for key in keys])
        counts = np.diff(self._begins, append=len(self._document)) // self._widths
        self._patterns = pack_classes(sizes, counts, limit)
        self._ends = np.cumsum([pattern.rows for pattern in self._patterns])
        self._order = permutation(rng, len(self))

    def _place(self, lengths: np.ndarray, kinds: list[Kind], rng: Rng) -> None:
        """Sorts pieces into their runs: counts those of each, and then cuts them again."""
        documents, draw, runs = permutation(rng, len(lengths)), rng.random(), int(self._runs[-1])

        def blocks() -> Iterator[tuple[Pieces, np.ndarray, np.ndarray]]:
            for pieces in cut(lengths, documents, kinds, draw):
                pieces = pieces[pieces.length >= SHORTEST]
                run = self._runs[pieces.kind] - pieces.length
                yield pieces, run, np.bincount(run, minlength=runs)

        free = sum(counts for *_, counts in blocks())
        self._run_ends = np.cumsum(free)
        free = self._run_ends - free
        self._document = np.empty(self._run_ends[-1], documents.dtype)
        self._offset = np.empty(self._run_ends[-1], np.min_scalar_type(int(lengths.max())))
        for pieces, run, counts in blocks():
            order = np.argsort(run, kind="stable")
            place = np.repeat(free + counts - np.cumsum(counts), counts) + np.arange(len(run))
            self._document[place] = pieces.document[order]
            self._offset[place] = pieces.offset[order]
            free += counts

    def _classes(self, kinds: list[Kind]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first piece of each class, whose items take the same of a row, and the pieces of an
        item."""
        begins, widths, start = [], [], 0
        for kind, end in zip(kinds, self._run_ends[self._runs - 1].tolist(), strict=True):
            width = 1 if kind.mirrored is None else 2  # neighbours are about as long
            edges = self._run_ends[(start < self._run_ends) & (self._run_ends < end)] - start
            edges = start + width * np.unique(-(-np.append(0, edges) // width))
            whole = end - (end - start) % width  # behind it a piece is left alone
            begins.append(np.append(edges[edges < whole], np.arange(whole, end)))
            widths.append(np.minimum(width, end - begins[-1]))
            start = end
        return np.concatenate(begins), np.concatenate(widths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def most(self) -> int:
        """Examples of the row that has the most."""
        held = (pattern.items(0) for pattern in self._patterns)
        return int(max(sum(len(n) * self._widths[k] for k, n in row) for row in held))

    def row(self, i: int) -> list[Pieces]:
        """Returns the items of a row: one piece each, or two that share a draw."""
        place = int(self._order[i])
        p = int(np.searchsorted(self._ends, place, side="right"))
        pattern = self._patterns[p]
        found = pattern.items(place - (int(self._ends[p]) - pattern.rows))
        items = [(self._begins[k], self._widths[k], n) for k, numbers in found for n in numbers]
        return [self._found(begin + n * width + np.arange(width)) for begin, width, n in items]

    def _found(self, index: np.ndarray) -> Pieces:
        run = np.searchsorted(self._run_ends, index, side="right")
        kind = np.searchsorted(self._runs, run, side="right")
        return Pieces(self._document[index], self._offset[index], self._runs[kind] - run, kind)


class DocumentRows:
    """Rows of several examples, each a document or a piece of one (see `rows.Task`).

    dataset: an IndexedDataset of documents. plans: the rows of its components, of which the longest
    pieces are known.
    """

    def __init__(
        self,
        dataset,
        plans: Mixed,
        model: Model,
        converter: Converter,
        vocabulary: Vocabulary,
        seed: int,
    ):
        self.dataset, self.kinds = dataset, kinds_of(plans)
        self.converter, self.vocabulary, self.seed = converter, vocabulary, seed
        self.lengths = dataset.lengths
        self.examples = len(self.lengths)
        self.truncated = int((self.lengths < SHORTEST).sum())
        if self.truncated == self.examples:
            raise UserError("no document of the text has two tokens: give more text")
        self._epoch = lru_cache(maxsize=1)(self._plan)  # rows are asked for in turn
        room = fixed_shape(model, [plan.shape for _, plan in plans]).streams
        self._first = np.array([*room, room[0]])
        first = self._epoch(0)
        self._later = np.array([*room, first.most])
        self._ends = [len(first)]
        self.per_epoch = len(first)  # another epoch may have a few more or less
        one = RowShape.largest(
            [converter.shape(kind.objective.lengths(kind.raw)) for kind in self.kinds]
        )
        self.shape = RowShape(room, room[-1], first.most * one.parts, first.most * one.cross_parts)
        self._try()

    def _plan(self, epoch: int) -> EpochPlan:
        rng = generator(self.seed ^ ORDER, epoch)
        limit = self._later if epoch else self._first  # whenever it is asked for
        return EpochPlan(self.lengths, self.kinds, self._size, limit, rng)

    def _size(self, k: int, length: int, paired: bool) -> list[int]:
        """A bound on the tokens of each stream, and the number of examples."""
        return [*self._bound(k, length, paired).streams, 1 + paired]

    def _bound(self, k: int, length: int, paired: bool) -> RowShape:
        objective = self.kinds[k].objective
        if paired:
            assert isinstance(objective, SplitObjective)
            return pair_shape(self.converter, objective, length)
        return self.converter.shape(objective.lengths(length))

    def _try(self) -> None:
        """UserError where the vocabulary has too few sentinels for the longest pieces."""
        token = int(np.flatnonzero(self.vocabulary.text)[0])
        for kind in self.kinds:
            kind.objective(np.full(kind.raw, token), self.vocabulary, generator(self.seed, 0))

    def row(self, i: int, rng_key: tuple[int, int]) -> list[Converted]:
        """The i-th row; noise is drawn from the generator of `rng_key`."""
        while i >= self._ends[-1]:
            self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends))))
        epoch = bisect_right(self._ends, i)
        place = i - (self._ends[epoch - 1] if epoch else 0)
        rng = generator(*rng_key)
        return [
            example
            for item in self._epoch(epoch).row(place)
            for example in self._examples(item, rng)
        ]

    def _examples(self, item: Pieces, rng: Rng) -> list[Converted]:
        k = int(item.kind[0])
        kind, paired = self.kinds[k], len(item.kind) == 2
        where = zip(item.document, item.offset, item.length, strict=True)
        texts = [self.dataset.get(*map(int, place)).astype(np.int64) for place in where]
        if not paired:
            return [self._convert(kind.objective, texts[0], rng)]
        assert kind.mirrored is not None
        bound = self._bound(k, len(texts[0]), paired)
        # one draw in a million is not the same share of two lengths, and is made again
        while True:
            key = int(rng.integers(1 << 62))
            one = self._convert(kind.objective, texts[0], generator(key, 0))
            two = self._convert(kind.mirrored, texts[1], generator(key, 0))
            if bound.fits(one.shape + two.shape):
                return [one, two]

    def _convert(self, objective: Objective, text: np.ndarray, rng: Rng) -> Converted:
        return self.converter(objective(text, self.vocabulary, rng), self.vocabulary)
