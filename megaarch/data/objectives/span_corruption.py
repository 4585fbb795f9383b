"""Span corruption (T5) and its mixture of denoisers (UL2).

raw       Thank you for inviting me to your party last week
inputs    Thank you <0> me to your party <1> week <eos>
targets   <0> for inviting <1> last <eos>

Counts are those of t5.data.preprocessors (0.9.4), rounded in float32, halves to even: 0.15·190 = 28.5
would be 28, but float32 has 28.500002 and so 29.
"""

from dataclasses import dataclass

import numpy as np

from megaarch.data.example import Example, Lengths, Rng, Tokens, Vocabulary
from megaarch.data.objectives.spans import (
    as_row,
    forced,
    join,
    ranges,
    require_share,
    require_span_length,
    split,
)


@dataclass(frozen=True)
class SpanCorruption:
    """n = round(raw·noise_density) tokens in s = round(n / mean_span_length) spans, each replaced
    by a sentinel (Raffel et al. 2020, 3.1.4; t5's random_spans_noise_mask). Noise and non-noise are
    each split uniformly into s non-empty segments; a row starts with non-noise.

    mode: special that leads the inputs ("mode_r", "mode_x": UL2), or None.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    mode: str | None = None
    name: str = "span_corruption"

    def __post_init__(self):
        require_share(self.name, self.noise_density, 0.9)  # little text left asks for endless rows
        require_span_length(self.name, self.mean_span_length)

    def counts(self, raw: int) -> tuple[int, int]:
        """Returns (noise tokens, spans) of a row of `raw` >= 2 tokens; as many sentinels as
        spans."""
        noise = np.rint(np.float32(raw) * np.float32(self.noise_density))
        noise = min(max(int(noise), 1), raw - 1)
        spans = max(int(np.rint(np.float32(noise) / np.float32(self.mean_span_length))), 1)
        return noise, min(spans, raw - noise)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 2, self.name)
        noise, spans = self.counts(len(tokens))
        kept = segment(len(tokens) - noise, spans, rng)
        lengths = segment(noise, spans, rng)
        starts = np.cumsum(kept) + np.cumsum(lengths) - lengths
        last = vocabulary.sentinel(spans - 1)
        sentinels = np.arange(last + spans - 1, last - 1, -1)
        text, noised = tokens[ranges(starts - kept, kept)], tokens[ranges(starts, lengths)]
        inputs = np.insert(text, np.cumsum(kept), sentinels)
        targets = np.insert(noised, np.cumsum(lengths) - lengths, sentinels)
        mode = [] if self.mode is None else [vocabulary.special[self.mode]]
        return Example(join(*mode, inputs, vocabulary.eos), join(targets, vocabulary.eos))

    def lengths(self, raw: int) -> Lengths:
        """Exact: inputs raw - n + s + 1 (and the mode token), targets n + s + 1."""
        raw = max(raw, 2)
        noise, spans = self.counts(raw)
        return Lengths(raw - noise + spans + 1 + (self.mode is not None), noise + spans + 1)


@dataclass(frozen=True)
class SequentialDenoising:
    """UL2's S-denoiser: the last tokens of a row are the targets, `noise_density` of it on average
    (Tay et al. 2023, table 1: r = 0.25, mean span L/4, one span).

    The prefix is uniform from round((1 - 2·noise_density)·(raw - 1)), at least 1, to raw - 1
    tokens (t5's random_prefix_noise_mask).
    inputs: the mode token, the prefix and the end token; targets: the suffix and the end token.
    mirrored: as prefix_lm's: the longest prefix where the draw gives the shortest, and so on.
    """

    noise_density: float = 0.25
    mode: str = "mode_s"
    mirrored: bool = False
    name: str = "ul2"

    def __post_init__(self):
        require_share(self.name, self.noise_density, 0.5)

    def shortest_prefix(self, raw: int) -> int:
        """Returns the number of tokens of the shortest prefix of a row of `raw` >= 2 tokens."""
        shortest = np.rint(np.float32(1 - 2 * self.noise_density) * np.float32(raw - 1))
        return max(int(shortest), 1)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 2, self.name)
        shortest = self.shortest_prefix(len(tokens))
        prefix, suffix = split(tokens, shortest, self.mirrored, rng)
        inputs = join(vocabulary.special[self.mode], prefix, vocabulary.eos)
        return Example(inputs, join(suffix, vocabulary.eos))

    def lengths(self, raw: int) -> Lengths:
        """Bounds; inputs and targets together are exactly raw + 3."""
        raw = max(raw, 2)
        return Lengths(raw + 1, raw - self.shortest_prefix(raw) + 1, total=raw + 3)

    def pair(self, raw: int) -> Lengths:
        """Exactly what two examples of one draw take, of which one is mirrored."""
        raw = max(raw, 2)
        shortest = self.shortest_prefix(raw)
        return Lengths(raw + shortest + 3, raw - shortest + 3)


@dataclass(frozen=True)
class Spans:
    """How a form gives what stands before its scored tokens: with evenly placed spans.

    length: tokens of a span. period: tokens of text for each. targets: those of the longest example of
    training, which a form exceeds no more; None: any number.
    """

    length: int = 3
    period: int = 20
    targets: int | None = None

    @classmethod
    def of(cls, noise: SpanCorruption, targets: int | None = None) -> "Spans":
        """Returns spans as many in a text as those of `noise`, and as much of it: at least a token of it
        stands before each."""
        share = noise.noise_density
        period = max(round(max(noise.mean_span_length / share, 1 / (1 - share))), 2)
        return cls(min(max(round(share * period), 1), period - 1), period, targets)

    def split(self, before: Tokens, after: Tokens, vocabulary: Vocabulary) -> tuple[Tokens, Tokens]:
        """Returns the inputs, and the targets that are given: the spans of `before`, and the sentinel
        that stands between it and `after`. A row ends in a sentinel, whose span is not asked for."""
        spans = len(before) // self.period  # the rest is kept, a token of it where it is not all
        spans -= spans > 0 and len(before) % self.period == 0
        kept, given = [], []
        for k in range(spans):
            start, end = k * self.period, (k + 1) * self.period
            kept += [before[start : end - self.length], vocabulary.sentinel(k)]
            given += [vocabulary.sentinel(k), before[end - self.length : end]]
        kept += [before[spans * self.period :], vocabulary.sentinel(spans), after]
        if len(after):
            kept.append(vocabulary.sentinel(spans + 1))
        return join(*kept, vocabulary.eos), join(*given, vocabulary.sentinel(spans))


SPAN_CORRUPTION = ((1.0, SpanCorruption()),)
S_SHARE = 0.2  # of the rows: the share of S-denoisers that Tay et al. 2023, 4.5 settle on
R_AND_X = tuple(
    SpanCorruption(density, length, mode, name="ul2")
    for mode, length, density in (
        ("mode_r", 3.0, 0.15),
        ("mode_r", 8.0, 0.15),
        ("mode_x", 3.0, 0.5),
        ("mode_x", 8.0, 0.5),
        ("mode_x", 64.0, 0.15),
        ("mode_x", 64.0, 0.5),
    )
)
UL2 = (
    *(((1 - S_SHARE) / len(R_AND_X), denoiser) for denoiser in R_AND_X),
    (S_SHARE, SequentialDenoising()),
)


def segment(items: int, segments: int, rng: Rng) -> np.ndarray:
    """Returns lengths of a split into non-empty segments, uniform over all such splits."""
    cuts = np.sort(rng.choice(items - 1, segments - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=items)


def middle(
    before: Tokens, scored: Tokens, after: Tokens, vocabulary: Vocabulary, spans: Spans = Spans()
) -> list[Example]:
    """The scored span in a row as training holds it: what stands before it has spans of its own, which
    are given. A longer one than such a row's targets hold is scored in pieces, each behind those before."""
    examples = []
    while len(scored):
        inputs, given = spans.split(before, after, vocabulary)
        most = len(scored) if spans.targets is None else max(spans.targets - len(given), 1)
        examples.append(forced(inputs, given, scored[:most]))
        before, scored = join(before, scored[:most]), scored[most:]
    return examples


def ul2_continuation(prefix: Tokens, scored: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """Scores the S-denoiser's suffix."""
    return [Example(join(vocabulary.mode_s, prefix, vocabulary.eos), scored)]


def ul2_middle(
    before: Tokens, scored: Tokens, after: Tokens, vocabulary: Vocabulary, spans: Spans = Spans()
) -> list[Example]:
    """Scores the R-denoiser's span."""
    return middle(join(vocabulary.mode_r, before), scored, after, vocabulary, spans)
