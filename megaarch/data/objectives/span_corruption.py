"""Span corruption (T5) and its mixture of denoisers (UL2).

raw       Thank you for inviting me to your party last week
inputs    Thank you <0> me to your party <1> week <eos>
targets   <0> for inviting <1> last <eos>
"""

from dataclasses import dataclass

import numpy as np

from megaarch.data.example import Example, Lengths, Vocabulary
from megaarch.data.objectives.spans import as_row, ranges, require_share, require_span_length


@dataclass(frozen=True)
class SpanCorruption:
    """n = round(raw·noise_density) tokens in s = round(n / mean_span_length) spans, each replaced
    by a sentinel (Raffel et al. 2020, 3.1.4). Noise and non-noise are each split uniformly into s
    non-empty segments; a row starts with non-noise. Halves round to even, as in T5's own code.

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
        """(noise tokens, spans) of a row of `raw` >= 2 tokens; as many sentinels as spans."""
        noise = min(max(round(raw * self.noise_density), 1), raw - 1)
        spans = max(round(noise / self.mean_span_length), 1)
        return noise, min(spans, noise, raw - noise)

    def __call__(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        tokens = as_row(tokens, 2, self.name)
        noise, spans = self.counts(len(tokens))
        kept = segment(len(tokens) - noise, spans, rng)
        lengths = segment(noise, spans, rng)
        starts = np.cumsum(kept) + np.cumsum(lengths) - lengths
        last = vocabulary.sentinel(spans - 1)
        sentinels = np.arange(last + spans - 1, last - 1, -1)

        led = self.mode is not None
        inputs = np.empty(len(tokens) - noise + spans + 1 + led, dtype=np.int64)
        if led:
            inputs[0] = vocabulary.special[self.mode]
        fill(inputs[led:-1], kept, sentinels, tokens[ranges(starts - kept, kept)], after=True)
        inputs[-1] = vocabulary.eos

        targets = np.empty(noise + spans + 1, dtype=np.int64)
        fill(targets[:-1], lengths, sentinels, tokens[ranges(starts, lengths)], after=False)
        targets[-1] = vocabulary.eos
        return Example(inputs=inputs, targets=targets)

    def lengths(self, raw: int) -> Lengths:
        """Exact: inputs raw - n + s + 1 (and the mode token), targets n + s + 1."""
        raw = max(raw, 2)
        noise, spans = self.counts(raw)
        return Lengths(raw - noise + spans + 1 + (self.mode is not None), noise + spans + 1)


@dataclass(frozen=True)
class SequentialDenoising:
    """UL2's S-denoiser: the last round(raw·suffix) tokens are the targets (Tay et al. 2023, 3.1).

    inputs: the mode token and the prefix; targets: the suffix and the end token.
    """

    suffix: float = 0.25
    mode: str = "mode_s"
    name: str = "ul2"

    def __post_init__(self):
        require_share(self.name, self.suffix)

    def count(self, raw: int) -> int:
        """Tokens of the suffix."""
        return min(max(round(raw * self.suffix), 1), raw - 1)

    def __call__(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        tokens = as_row(tokens, 2, self.name)
        split = len(tokens) - self.count(len(tokens))
        return Example(
            inputs=np.concatenate([[vocabulary.special[self.mode]], tokens[:split]]),
            targets=np.append(tokens[split:], vocabulary.eos),
        )

    def lengths(self, raw: int) -> Lengths:
        """Exact."""
        raw = max(raw, 2)
        count = self.count(raw)
        return Lengths(raw - count + 1, count + 1)


UL2 = (
    *tuple(
        SpanCorruption(density, length, mode, name="ul2")
        for mode, length, density in (
            ("mode_r", 3.0, 0.15),
            ("mode_r", 8.0, 0.15),
            ("mode_x", 3.0, 0.5),
            ("mode_x", 8.0, 0.5),
            ("mode_x", 64.0, 0.15),
            ("mode_x", 64.0, 0.5),
        )
    ),
    SequentialDenoising(),
)


def segment(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of a split into non-empty segments, uniform over all such splits."""
    cuts = np.sort(rng.choice(items - 1, segments - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=items)


def fill(
    out: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray, text: np.ndarray, after: bool
) -> None:
    """Write segments of these lengths, each with its sentinel ahead of it or after it."""
    ends = np.cumsum(lengths + 1)
    is_text = np.ones(len(out), dtype=bool)
    is_text[ends - 1 if after else ends - lengths - 1] = False
    out[is_text] = text
    out[~is_text] = sentinels
