"""Feature converters: an Example to the streams, parts and targets that an architecture takes.

One for each architecture, seqio's word. Drawn here with inputs a b c and targets X Y; ^ is the
start token; under each row the token that is read off at it; . carries no loss.

    causal_decoder      tokens     ^ a b c X          C[0:5; 0:5]
                        targets    . . . X Y

    prefix_decoder      tokens     ^ a b c X          R[0:4; 0:4] + C[4:5; 0:5]
                        targets    . . . X Y

    encoder_decoder     encoder    a b c              R[0:3; 0:3]
                        decoder    ^ X                C[0:2; 0:2], cross R[0:2; 0:3]
                        targets    X Y

    encoder             tokens     a _ c _ e          R[0:5; 0:5]            (cloze: b, d masked)
                        targets    . b . d .

    two_stream          tokens     a c e d b  ? ?     R[0:3; 0:3] + C[3:5; 0:5]  content stream
                        positions  0 2 4 3 1  3 1     C[5:7; 0:4]                query stream
                        targets    . . . . .  d b     (targets d then b; ? is the query token)

Packed, the examples stand one after the other, and each part moves along with its example:

    prefix_decoder      tokens     ^ a b c X | ^ a X Y | pad pad
                        positions  0 1 2 3 4   0 1 2 3   0   0
                        parts      R[0:4; 0:4] + C[4:5; 0:5] + R[5:7; 5:7] + C[7:9; 5:9]

Blank infilling (GLM) brings its own decoder tokens in `feed`: a decoder's row then is inputs and
feed, without a start token, and the prefix is the inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megaarch.attention.mask import causal, full
from megaarch.config.catalogue import ARCHITECTURES
from megaarch.config.registry import load
from megaarch.data import conditional_forms
from megaarch.data.example import (
    Converted,
    ConvertedStream,
    Converter,
    Example,
    Lengths,
    RowShape,
    Tokens,
    Vocabulary,
)
from megaarch.data.objectives.span_corruption import Spans
from megaarch.errors import UserError

Part = tuple[int, ...]


@dataclass(frozen=True)
class Decoder:
    """One stack over inputs and targets in one row.

    bidirectional_prefix: inputs see each other (the non-causal decoder of Wang et al. 2022, 3.1:
    with the start token, so up to and with the row that predicts the first target). Only then can
    it take cloze examples (UniLM).
    """

    name: str
    bidirectional_prefix: bool

    def __call__(self, example: Example, vocabulary: Vocabulary) -> Converted:
        """Raises UserError for permutation examples, and for cloze without a bidirectional
        prefix."""
        if example.places is not None and not example.permuted and self.bidirectional_prefix:
            return cloze(example)
        require(example, "sequence", self.name)
        if example.predict_inputs and not self.bidirectional_prefix:
            assert example.feed is None and example.weights is None
            joined = np.concatenate([example.inputs, example.targets])
            example = Example(inputs=joined[:0], targets=joined)
        start, targets = len(example.inputs), len(example.targets)
        if example.feed is None:
            if example.input_positions is not None:
                raise ValueError(
                    f"{self.name} takes positions only with `feed`, whose rows they are"
                )
            row = [[vocabulary.bos], example.inputs, example.targets]
            prefix = min(start + 1, start + targets) if start else 0
        else:
            row = [example.inputs, example.feed]
            prefix = start
        tokens = np.concatenate(row)[: start + targets].astype(np.int64)
        positions = example.input_positions
        if positions is not None:
            assert example.feed_positions is not None
            positions = np.concatenate([positions, example.feed_positions])
        stream = ConvertedStream(
            tokens,
            positions_or_range(positions, len(tokens)),
            prefix_parts(prefix if self.bidirectional_prefix else 0, len(tokens)),
        )
        return finish(example, (stream,), start + np.arange(targets))

    def shape(self, lengths: Lengths) -> RowShape:
        total = lengths.inputs + lengths.targets if lengths.total is None else lengths.total
        rows = lengths.inputs if lengths.in_place else total
        all_targets = lengths.predict_inputs and not self.bidirectional_prefix
        targets = rows if all_targets else lengths.targets
        return RowShape((rows,), targets, 1 + self.bidirectional_prefix)


@dataclass(frozen=True)
class EncoderDecoder:
    """A bidirectional stack over inputs, and a causal one over targets that attends to it."""

    name: str = "encoder_decoder"

    def __call__(self, example: Example, vocabulary: Vocabulary) -> Converted:
        """Raises UserError for cloze and permutation examples. Without inputs, cross-attention
        sees nothing and gives zero.
        """
        require(example, "sequence", self.name)
        n, m = len(example.inputs), len(example.targets)
        feed = example.feed
        if feed is None:
            feed = np.concatenate([[vocabulary.bos], example.targets])[:m]
        cross = [full(0, m, 0, n)] if n and m else []
        encoder = stream_of(example.inputs, full, example.input_positions)
        decoder = stream_of(feed, causal, example.feed_positions, cross)
        return finish(example, (encoder, decoder), np.arange(m))

    def shape(self, lengths: Lengths) -> RowShape:
        return RowShape((lengths.inputs, lengths.targets), lengths.targets, 1, 1)


@dataclass(frozen=True)
class Encoder:
    """One bidirectional stack; masked tokens are predicted at their places."""

    name: str = "encoder"

    def __call__(self, example: Example, vocabulary: Vocabulary) -> Converted:
        """Raises UserError for anything but cloze examples that all see all."""
        require(example, "cloze", self.name)
        if example.prefix is not None or example.reverse:
            raise UserError("encoder takes cloze examples without a direction: use prefix_decoder")
        return cloze(example)

    def shape(self, lengths: Lengths) -> RowShape:
        return RowShape((lengths.inputs,), lengths.targets, 1)


@dataclass(frozen=True)
class TwoStream:
    """XLNet's two streams in one row: content sorted by factorization order, then a query token
    for each target (Yang et al. 2019, 2.3). Positions tell the original places.
    """

    name: str = "two_stream"

    def __call__(self, example: Example, vocabulary: Vocabulary) -> Converted:
        """Raises UserError for anything but permutation examples."""
        require(example, "permutation", self.name)
        n, m = len(example.inputs), len(example.targets)
        places = np.asarray(example.places, dtype=np.int64)
        order = np.concatenate([np.setdiff1d(np.arange(n), places), places])
        c = n - m
        positions = positions_or_range(example.input_positions, n)
        stream = ConvertedStream(
            np.concatenate([example.inputs[order], np.full(m, vocabulary.query)]).astype(np.int64),
            np.concatenate([positions[order], positions[places]]),
            prefix_parts(c, n) + ([causal(n, n + m, 0, n - 1)] if m else []),
        )
        return finish(example, (stream,), n + np.arange(m))

    def shape(self, lengths: Lengths) -> RowShape:
        return RowShape((lengths.inputs + lengths.targets,), lengths.targets, 3)


CAUSAL_DECODER = Decoder("causal_decoder", bidirectional_prefix=False)
PREFIX_DECODER = Decoder("prefix_decoder", bidirectional_prefix=True)
ENCODER_DECODER, ENCODER, TWO_STREAM = EncoderDecoder(), Encoder(), TwoStream()


def converter_of(architecture: str) -> Converter:
    """Returns the feature converter that the architecture's row in the catalogue names."""
    return load(ARCHITECTURES[architecture].converter)


def converted_continuation(
    objective: str,
    architecture: str,
    prefix: Tokens,
    scored: Tokens,
    vocabulary: Vocabulary,
    spans: Spans | None = None,
) -> list[Converted]:
    """Returns the examples of conditional_forms.continuation as the architecture eats them."""
    convert = converter_of(architecture)
    examples = conditional_forms.continuation(
        objective, architecture, prefix, scored, vocabulary, spans
    )
    return [convert(example, vocabulary) for example in examples]


def require(example: Example, wanted: str, architecture: str) -> None:
    """Raises UserError unless the example is of the `wanted` family."""
    family = "sequence" if example.places is None else "cloze"
    if example.permuted:
        family = "permutation"
    if family != wanted:
        raise UserError(
            f"{architecture} takes {wanted} examples and was given a {family} example: "
            "choose another data.objective or model.architecture"
        )


def prefix_parts(p: int, n: int) -> list[Part]:
    """Returns R[0:p; 0:p] + C[p:n; 0:n], empty parts left out."""
    return ([full(0, p, 0, p)] if p else []) + ([causal(p, n, 0, n)] if p < n else [])


def cloze(example: Example) -> Converted:
    """Returns one row of the inputs, each target read off at its own place."""
    n = len(example.inputs)
    prefix = n if example.prefix is None else example.prefix
    if example.reverse and prefix:
        raise ValueError("a reversed cloze example is right to left: its prefix must be 0")
    tokens = np.asarray(example.inputs, dtype=np.int64)
    positions = positions_or_range(example.input_positions, n)
    index = np.asarray(example.places, dtype=np.int64)
    if example.reverse:
        tokens, positions, index = tokens[::-1].copy(), positions[::-1].copy(), n - 1 - index
    return finish(example, (ConvertedStream(tokens, positions, prefix_parts(prefix, n)),), index)


def stream_of(
    tokens: Sequence[int] | np.ndarray,
    shape: Callable[[int, int, int, int], tuple[int, ...]],
    positions: np.ndarray | None = None,
    cross_parts: Sequence[tuple[int, ...]] = (),
) -> ConvertedStream:
    """Returns a stream of one part, `causal` or `full`, or of none without tokens."""
    n = len(tokens)
    return ConvertedStream(
        np.asarray(tokens, dtype=np.int64),
        positions_or_range(positions, n),
        [shape(0, n, 0, n)] if n else [],
        list(cross_parts),
    )


def positions_or_range(positions: np.ndarray | None, length: int) -> np.ndarray:
    """Returns int64 [length, A]: the positions given, else 0, 1, 2, ... on one axis."""
    if positions is None:
        return np.arange(length)[:, None]
    return np.asarray(positions, dtype=np.int64)


def finish(
    example: Example, streams: tuple[ConvertedStream, ...], target_index: np.ndarray
) -> Converted:
    """Returns the streams with the targets, of weight 1 unless the example says otherwise."""
    weights = example.weights
    if weights is None:
        weights = np.ones(len(example.targets))
    assert len(weights) == len(target_index) == len(example.targets)
    return Converted(
        streams,
        target_index,
        np.asarray(example.targets, dtype=np.int64),
        np.asarray(weights, dtype=np.float32),
    )
