"""Blank infilling (GLM): spans leave one mask each and are generated after the text.

    raw              a b c d e f               spans: (c) and (e f)
    inputs (part A)  a b [M] d [M]             positions  0 1 2 3 4     axis 1
                                                          0 0 0 0 0     axis 2
    feed (part B)    <sop> e f   <sop> c       positions  4 4 4 2 2
    targets          e f <eop>   c <eop>                  1 2 3 1 2

A suffix ([gMASK]) has no <eop>: a row ends where the next begins, and the text goes on.

Of the rows 50% are [MASK] (short spans), 30% [sMASK] (whole sentences) and 20% [gMASK], as in
GLM's scripts ds_block_large.sh and ds_block_10B.sh; counts and placement are those of its
blocklm_utils.py (Du et al. 2022, 2.1 and 2.2).
"""

import math
from dataclasses import dataclass

import numpy as np

from megaarch.data.example import Example, Lengths, Rng, Tokens, Vocabulary
from megaarch.data.objectives.spans import (
    as_row,
    draw_lengths,
    join,
    ranges,
    replace_spans,
    require_share,
    require_span_length,
    restricted_poisson,
    sentence_starts,
    until,
)

LONGEST = 39  # tokens of a [MASK] span
DRAWS = 32


@dataclass(frozen=True)
class SpanInfilling:
    """[MASK]: spans of Poisson(mean_span_length) restricted to 1..39 tokens are drawn until they
    hold floor(noise_density·raw) tokens, at least 1, and placed in random order with at least one
    token between neighbours (`scatter`).

    To keep rows of one length, draws with more spans than `most_spans` are made again (1 row in
    300 at 512 tokens), and the last span is trimmed where it exceeds the noise by more than
    2·mean_span_length + 1 tokens (1 row in 600).
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    name: str = "blank_infilling"

    def __post_init__(self):
        require_share(self.name, self.noise_density, 0.5)
        require_span_length(self.name, self.mean_span_length)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 1, self.name)
        raw, probabilities = len(tokens), restricted_poisson(self.mean_span_length, LONGEST)
        noise, surplus = noise_of(raw, self.noise_density), self.surplus(raw)
        most = self.most_spans(noise)
        for _ in range(DRAWS):
            lengths = until(draw_lengths(probabilities, noise, rng), noise, surplus)
            assert lengths is not None, "as many draws as tokens, each of a token at least"
            if len(lengths) <= min(most, raw - lengths.sum() + 1):
                break
        else:
            lengths = np.array([noise])
        lengths = rng.permutation(lengths)
        starts = scatter(lengths, raw, rng)
        return blank(tokens, starts, lengths, vocabulary.mask, vocabulary, rng)

    def surplus(self, raw: int) -> int:
        """Returns the number of tokens by which the spans may exceed the noise."""
        noise = noise_of(raw, self.noise_density)
        return min(math.ceil(2 * self.mean_span_length) + 1, noise, raw - noise)

    def most_spans(self, noise: int) -> int:
        """Returns the bound on the number of spans: 2.5 deviations above its mean (renewal
        theory)."""
        lengths = np.arange(1, LONGEST + 1)
        probabilities = restricted_poisson(self.mean_span_length, LONGEST)
        mean = float(probabilities @ lengths)
        variance = float(probabilities @ (lengths - mean) ** 2)
        return min(noise, math.ceil(noise / mean + 1 + 2.5 * math.sqrt(noise * variance / mean**3)))

    def lengths(self, raw: int) -> Lengths:
        """Bounds; inputs and targets together are the tokens and two for each span."""
        noise = noise_of(raw, self.noise_density)
        spans = self.most_spans(noise)
        targets = noise + self.surplus(raw) + spans
        return Lengths(raw - noise + spans, targets, total=raw + 2 * spans)


@dataclass(frozen=True)
class SentenceInfilling:
    """[sMASK]: whole sentences in random order until they hold floor(noise_density·raw) tokens, at
    least 1. The row's edges count as ends of sentences.

    A row of one sentence has one random span of that many tokens instead. Draws of more sentences
    than `most_spans` are made again (at 512 tokens 1 row in 100 where lines of 7 tokens count as
    sentences, next to none of prose); where the sentences are too short for any draw, one run of
    neighbouring sentences is taken as one span.
    """

    noise_density: float = 0.15
    name: str = "blank_infilling"

    def __post_init__(self):
        require_share(self.name, self.noise_density, 0.5)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 1, self.name)
        noise = noise_of(len(tokens), self.noise_density)
        starts = sentence_starts(tokens, vocabulary)
        if len(starts) == 1:
            chosen = np.array([rng.integers(len(tokens) - noise + 1)]), np.array([noise])
        else:
            chosen = self.draw_sentences(starts, len(tokens), noise, rng)
        return blank(tokens, *chosen, vocabulary.sentence_mask, vocabulary, rng)

    def draw_sentences(
        self, starts: np.ndarray, raw: int, noise: int, rng: Rng
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (starts, lengths) of the spans."""
        lengths = np.diff(starts, append=raw)
        for _ in range(DRAWS):
            order = rng.permutation(len(starts))
            count = int(np.searchsorted(np.cumsum(lengths[order]), noise)) + 1
            if count <= self.most_spans(raw):
                chosen = np.sort(order[:count])
                return starts[chosen], lengths[chosen]
        edges = np.append(starts, raw)
        first = rng.integers(np.searchsorted(starts, raw - noise, side="right"))
        last = np.searchsorted(edges, starts[first] + noise)
        return starts[first : first + 1], edges[last : last + 1] - starts[first]

    def most_spans(self, raw: int) -> int:
        """Returns the bound on the number of spans."""
        return min(noise_of(raw, self.noise_density), 3 + math.ceil(raw / 48))

    def lengths(self, raw: int) -> Lengths:
        """Bounds; a long sentence can take all tokens into the targets."""
        spans = self.most_spans(raw)
        inputs = raw - noise_of(raw, self.noise_density) + spans
        return Lengths(inputs, raw + spans, total=raw + 2 * spans)


@dataclass(frozen=True)
class SuffixInfilling:
    """[gMASK]: one suffix, its length uniform from floor(shortest·raw), at least 1, to all tokens
    but one. The paper's shortest is 0.5 (Du et al. 2022, 2.2), that of the scripts 0.25.
    """

    shortest: float = 0.25
    name: str = "blank_infilling"

    def __post_init__(self):
        require_share(self.name, self.shortest)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 2, self.name)
        length = rng.integers(noise_of(len(tokens), self.shortest), len(tokens))
        before, suffix = tokens[:-length], tokens[-length:]
        return one_blank(before, suffix, tokens[:0], vocabulary.suffix_mask, vocabulary)

    def lengths(self, raw: int) -> Lengths:
        """Bounds; inputs and targets together are exactly raw + 1."""
        raw = max(raw, 2)
        return Lengths(raw - noise_of(raw, self.shortest) + 1, raw - 1, total=raw + 1)


def noise_of(raw: int, share: float) -> int:
    """Returns floor(raw·share), at least 1."""
    return max(int(raw * share), 1)


def scatter(lengths: np.ndarray, total: int, rng: Rng) -> np.ndarray:
    """Returns starts of spans of these lengths, in this order, in `total` items with at least one
    item between neighbours. Needs len(lengths) <= total - sum + 1.

    Each span draws its place among the items left over on its own, as in GLM's sample_spans: a gap
    of one item is half as frequent as if all placements were alike.
    """
    left = total - int(lengths.sum()) - len(lengths) + 1
    points = np.sort(rng.integers(left, size=len(lengths), endpoint=True))
    return points + np.cumsum(lengths + 1) - lengths - 1


def blank(
    tokens: Tokens,
    starts: np.ndarray,
    lengths: np.ndarray,
    mask: int,
    vocabulary: Vocabulary,
    rng: Rng,
) -> Example:
    """Returns part A with one `mask` a span, and part B with the spans shuffled."""
    inputs, index = replace_spans(tokens, starts, lengths, mask)
    order = rng.permutation(len(starts))
    starts, lengths, index = starts[order], lengths[order], index[order]
    first = np.cumsum(lengths + 1) - lengths - 1  # of each span in part B
    spans = tokens[ranges(starts, lengths)]
    place = ranges(first, lengths)

    feed = np.full(len(spans) + len(starts), vocabulary.sop, dtype=np.int64)
    feed[place + 1] = spans
    targets = np.full(len(feed), vocabulary.eop, dtype=np.int64)
    targets[place] = spans
    return Example(
        inputs=inputs,
        targets=targets,
        feed=feed,
        input_positions=text_positions(len(inputs)),
        feed_positions=np.stack(
            [
                np.repeat(index, lengths + 1),
                np.arange(len(feed)) - np.repeat(first, lengths + 1) + 1,
            ],
            axis=1,
        ),
    )


def text_positions(length: int) -> np.ndarray:
    """Returns int [n, 2]: positions of part A: the index in it, and 0."""
    return np.stack([np.arange(length), np.zeros(length, dtype=np.int64)], axis=1)


def continuation(prefix: Tokens, scored: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """Scores a suffix behind [gMASK]."""
    return [one_blank(prefix, scored, prefix[:0], vocabulary.suffix_mask, vocabulary)]


def middle(before: Tokens, scored: Tokens, after: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """Scores a span behind [MASK]."""
    return [one_blank(before, scored, after, vocabulary.mask, vocabulary)]


def one_blank(
    before: Tokens, scored: Tokens, after: Tokens, mask: int, vocabulary: Vocabulary
) -> Example:
    """Returns an example of one span, generated at its mask's position."""
    inputs, m = join(before, mask, after), len(scored)
    return Example(
        inputs,
        scored,
        feed=join(vocabulary.sop, scored[:-1]),
        input_positions=text_positions(len(inputs)),
        feed_positions=np.stack([np.full(m, len(before)), np.arange(1, m + 1)], axis=1),
    )


BLANK_INFILLING = ((0.5, SpanInfilling()), (0.3, SentenceInfilling()), (0.2, SuffixInfilling()))
