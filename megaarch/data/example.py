"""The records that flow between objective, feature converter and packing, in the order they flow.

    objective   tokens      -> Example     what to condition on, what to predict
    converter   Example     -> Converted   the streams, parts and targets that a stack takes
    packing     [Converted] -> Batch       fixed shapes (data/batch.py)

All arrays are numpy, all on the host. Legend: n inputs, m targets, A position axes, P parts.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from megaarch.errors import UserError

Tokens = np.ndarray  # int [n]: token ids
Rng = np.random.Generator
LONGEST_RAW = 1 << 20  # tokens of a segment


@dataclass(frozen=True)
class Example:
    """The result of an objective for a segment of tokens.

    inputs: int [n], tokens to condition on.
    targets: int [m], tokens to predict.

    Three families, which differ in `places`:

    sequence (`places` is None): targets are generated left to right after the inputs. Target j is
        read off at the row that is fed `feed[j]`; with `feed` None that is the target before it,
        and the start token for j = 0.
    cloze (`places` given, `permuted` False): target j is predicted at input row `places[j]`.
        `prefix` input rows see each other and the rest see what is before them; None is all of
        them, 0 is left to right. `reverse` turns the direction round: right to left.
    permutation (`places` given, `permuted` True): `inputs` hold the uncorrupted tokens; target j
        is the token at `places[j]`, seen only by targets after it. Targets are in permuted order.

    input_positions, feed_positions: int [n, A] and [m, A]; None is 0, 1, 2, ... on one axis
        (through inputs and then targets where they share a row).
    weights: float [m], the loss weight of each target; None is all one.
    predict_inputs: the inputs are targets too where a token sees nothing after itself (a causal
        decoder); a stack whose inputs see each other cannot predict them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    places: np.ndarray | None = None
    permuted: bool = False
    prefix: int | None = None
    reverse: bool = False
    feed: np.ndarray | None = None
    input_positions: np.ndarray | None = None
    feed_positions: np.ndarray | None = None
    weights: np.ndarray | None = None
    predict_inputs: bool = False


@dataclass(frozen=True)
class Lengths:
    """An upper bound on the lengths of an Example: known from the raw length alone.

    in_place: targets are predicted at input rows (cloze and permutation), so they need no rows
        of their own in a decoder.
    total: a bound on inputs and targets together, where it is tighter than their sum (a split
        can fall anywhere, but both sides of it always make up the whole); None is the sum.
    predict_inputs: as Example's.
    """

    inputs: int
    targets: int
    in_place: bool = False
    total: int | None = None
    predict_inputs: bool = False


@dataclass(frozen=True)
class RowShape:
    """Fixed sizes of one batch row: tokens of each stream, targets, parts of each attention.

    `parts` and `cross_parts` count for every stream alike.
    """

    streams: tuple[int, ...]
    targets: int
    parts: int
    cross_parts: int = 0

    @classmethod
    def of(cls, sizes: Iterable[int]) -> "RowShape":
        """Returns the shape of these `sizes`."""
        *streams, targets, parts, cross_parts = sizes
        return cls(tuple(streams), targets, parts, cross_parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All of them, one after the other."""
        return (*self.streams, self.targets, self.parts, self.cross_parts)

    def fits(self, other: "RowShape") -> bool:
        """Returns whether a row of shape `other` fits into one of this shape."""
        return all(a >= b for a, b in zip(self.sizes, other.sizes, strict=True))

    @classmethod
    def largest(cls, shapes: Sequence["RowShape"]) -> "RowShape":
        """Returns the least shape into which each of `shapes` fits."""
        return cls.of(map(max, zip(*(shape.sizes for shape in shapes), strict=True)))

    def stretched(self, multiple: int) -> "RowShape":
        """Returns streams padded to lengths that `multiple` divides."""
        return replace(self, streams=tuple(-(-n // multiple) * multiple for n in self.streams))

    def __add__(self, other: "RowShape") -> "RowShape":
        return RowShape.of(map(sum, zip(self.sizes, other.sizes, strict=True)))


@dataclass(frozen=True)
class ConvertedStream:
    """One stack's tokens. tokens int [S]; positions int [S, A]; parts index this stream's rows.

    cross_parts: for a stream that attends to the one before it, parts whose queries index this
        stream and whose keys index the stream before.
    """

    tokens: np.ndarray
    positions: np.ndarray
    parts: list[tuple[int, ...]]
    cross_parts: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Converted:
    """The result of a converter for an Example: streams in stack order, targets on the last one.

    target_index int [M]: row of the last stream at which each target is read off.
    target_tokens int [M]; target_weights float32 [M].
    """

    streams: tuple[ConvertedStream, ...]
    target_index: np.ndarray
    target_tokens: np.ndarray
    target_weights: np.ndarray

    @property
    def shape(self) -> RowShape:
        return RowShape(
            tuple(len(stream.tokens) for stream in self.streams),
            len(self.target_index),
            max(len(stream.parts) for stream in self.streams),
            max(len(stream.cross_parts) for stream in self.streams),
        )

    @property
    def positions(self) -> tuple[int, ...]:
        """How many positions each stream takes, on any axis."""
        return tuple(int(s.positions.max()) + 1 if s.positions.size else 0 for s in self.streams)


class TooManySpans(UserError):
    """A row or a prompt with more spans than there are sentinels."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that objectives and converters need beside the text.

    Ids run: the tokenizer's own pieces, then the named specials, then the sentinels, which count
    down from the end of the vocabulary: sentinel(0) is size - 1 (T5, Raffel et al. 2020, 3.1.4).

    size: number of ids. sentinels: how many of them are sentinels.
    special: name -> id, for the names in SPECIALS.
    text: bool [size], True for ids that spell text (pieces and bytes; no control, no special).
    word_start: bool [size], True for ids that begin a word.
    sentence_end: bool [size], True for ids that end a sentence.
    """

    size: int
    sentinels: int
    special: dict[str, int]
    text: np.ndarray
    word_start: np.ndarray
    sentence_end: np.ndarray

    def __getattr__(self, name: str) -> int:
        # vocabulary.mask, vocabulary.bos, ...: the named specials.
        if name != "special" and name in self.special:
            return self.special[name]
        raise AttributeError(name)

    def sentinel(self, k: int) -> int:
        """Returns the id of sentinel k. TooManySpans where the vocabulary has no such sentinel."""
        if not 0 <= k < self.sentinels:
            raise TooManySpans(
                f"sentinel {k} asked for, but the vocabulary has {self.sentinels}: "
                "raise data.sentinels or shorten the rows"
            )
        return self.size - 1 - k


SPECIALS = (
    "pad",  # fills rows; never seen, never predicted
    "bos",  # start token of every decoder
    "eos",  # end of a document, an input or a target
    "mask",  # BERT, UniLM, BART: [MASK]; GLM: [MASK]
    "sentence_mask",  # GLM: [sMASK]
    "suffix_mask",  # GLM: [gMASK]
    "sop",  # GLM: start of a span
    "eop",  # GLM: end of a span
    "query",  # XLNet: what a query row is fed
    "mode_r",  # UL2: regular denoising
    "mode_s",  # UL2: sequential denoising
    "mode_x",  # UL2: extreme denoising
)


class Objective(Protocol):
    """A pure function of (tokens, vocabulary, rng), and its lengths.

    `rng` is keyed by (seed, sample index) and nothing else, so that every rank, stage, worker,
    restart and layout draws the same sample.
    """

    name: str
    __dataclass_fields__: ClassVar[dict[str, Any]]  # a frozen one, whose fields are its settings

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        """tokens: [raw]. Returns an Example within `self.lengths(raw)`."""
        ...

    def lengths(self, raw: int) -> Lengths:
        """Returns the bound for `raw` tokens. Never falls as raw grows."""
        ...


@runtime_checkable
class SplitObjective(Objective, Protocol):
    """An objective that splits a text in two at a drawn place; mirrored: the other way round for the
    same draw."""

    mirrored: bool

    def pair(self, raw: int) -> Lengths:
        """Returns what two examples of one draw take together, of which one is mirrored."""
        ...


class Converter(Protocol):
    """An architecture's way to lay out an Example in its streams."""

    def __call__(self, example: Example, vocabulary: Vocabulary) -> Converted: ...

    def shape(self, lengths: Lengths) -> RowShape:
        """Returns the bound on the row that an Example within `lengths` takes."""
        ...


def generator(seed: int, index: int) -> Rng:
    """Returns the generator of sample `index`: keyed by (seed, index) and nothing else."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), index]))


def largest_raw(fits: Callable[[int], bool]) -> int:
    """Returns the largest raw length for which `fits(raw)`, which fails for all above; 0 if none does."""
    return bisect_left(range(1, LONGEST_RAW), True, key=lambda raw: not fits(raw))
