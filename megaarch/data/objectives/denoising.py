"""Denoising (BART): sentences in another order, spans of words behind single masks.

raw       I saw a cat. It sat on a mat.
inputs    It sat [MASK] mat. I [MASK] saw a [MASK]
targets   I saw a cat. It sat on a mat.
"""

import math
from dataclasses import dataclass

import numpy as np

from megaarch.data.example import Example, Lengths, Vocabulary
from megaarch.data.objectives.spans import (
    as_row,
    ranges,
    replace_spans,
    require_share,
    require_span_length,
    scatter_spans,
    sentence_starts,
    share_up,
    until,
    word_starts,
)

DRAWS = 32


@dataclass(frozen=True)
class Denoising:
    """Sentence permutation, then text infilling (Lewis et al. 2020, 2.2).

    Sentences are shuffled uniformly. Then ceil(noise_density·words) words are masked in spans of
    Poisson(mean_span_length) words, the last span trimmed to that budget; each span becomes one
    [MASK], and one of length 0 inserts a [MASK]. Spans are placed uniformly among all placements
    with at least one word left between neighbours, so that no two masks touch. A special is a
    word of its own.

    Inputs that would exceed `lengths` have their spans drawn again: at 512 tokens about 1 row in
    80 of English with 7 words to 10 tokens, 1 in 15 at 128 tokens, and 1 in 7 where every token is
    a word (which lowers the mean number of spans by 2%). After 32 draws one span is laid over the
    densest run of words, which always fits: it takes a text that is mostly one word to get there.
    """

    noise_density: float = 0.3
    mean_span_length: float = 3.0
    name: str = "denoising"

    def __post_init__(self):
        require_share(self.name, self.noise_density, 0.5)
        require_span_length(self.name, self.mean_span_length)

    def __call__(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        targets = as_row(tokens, 1, self.name)
        tokens, words = permute_sentences(targets, vocabulary, rng)
        bound = self.lengths(len(tokens)).inputs
        starts, lengths = self.draw_spans(words, len(tokens), bound, rng)
        inputs, _ = replace_spans(tokens, starts, lengths, vocabulary.mask)
        return Example(inputs=inputs, targets=targets)

    def draw_spans(
        self, words: np.ndarray, raw: int, bound: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) in tokens. words: the index at which each word begins."""
        count = len(words)
        budget = share_up(count, self.noise_density)
        edges = np.append(words, raw)
        for _ in range(DRAWS):
            drawn = rng.poisson(self.mean_span_length, 2 * budget + 8)
            lengths = until(drawn, budget)
            if lengths is None or len(lengths) > count - budget + 1:
                continue
            first = scatter_spans(lengths, count, rng)
            starts, ends = edges[first], edges[first + lengths]
            if raw - (ends - starts).sum() + len(starts) <= bound:
                return starts, ends - starts
        covered = edges[budget:] - edges[: count - budget + 1]
        best = int(covered.argmax())
        return edges[best : best + 1], covered[best : best + 1]

    def lengths(self, raw: int) -> Lengths:
        """Targets exact. Inputs: the mean where every token is a word, and one deviation of the
        number of spans above it; never less than the densest single span leaves.
        """
        density, mean = self.noise_density, self.mean_span_length
        # Renewal theory: reaching a budget b in steps of Poisson(λ) takes about b/λ + 1/2 of them,
        # with variance b/λ².
        inputs = raw * (1 - density + density / mean) + 1 + math.sqrt(raw * density) / mean
        # 1/density runs of `budget` words cover the row, so one of them holds that share of it.
        longest = raw - math.ceil(raw / share_up(1, 1 / density)) + 1
        return Lengths(max(math.floor(inputs), longest), raw)


def permute_sentences(
    tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens with their sentences shuffled, and the indices at which words begin there."""
    starts = sentence_starts(tokens, vocabulary)
    lengths = np.diff(starts, append=len(tokens))
    order = rng.permutation(len(starts))
    index = ranges(starts[order], lengths[order])
    begins = word_starts(tokens, vocabulary)
    begins[starts] = True
    return tokens[index], np.flatnonzero(begins[index])
