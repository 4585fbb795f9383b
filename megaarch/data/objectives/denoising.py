"""Denoising (BART): sentences in another order, spans of words behind single masks.

raw       I saw a cat. It sat on a mat.
inputs    It sat [MASK] mat. I [MASK] saw a [MASK]
targets   I saw a cat. It sat on a mat.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from megaarch.data.example import Example, Lengths, Rng, Tokens, Vocabulary
from megaarch.data.objectives.spans import (
    as_row,
    forced,
    join,
    ranges,
    require_share,
    require_span_length,
    sentence_starts,
    until,
    word_starts,
)

DRAWS = 32


@dataclass(frozen=True)
class Denoising:
    """Sentence permutation, then text infilling (Lewis et al. 2020, 2.2), as fairseq 0.12.2's
    DenoisingDataset does it with whole words.

    Sentences are shuffled uniformly. Then spans of Poisson(mean_span_length) words are drawn until
    they hold ceil(noise_density·words), the last one trimmed to that `budget`. Each begins at a
    word of its own, drawn without replacement, ends at the row's end at the latest and becomes one
    [MASK]. Spans may touch and overlap: one that begins inside another is gone with it, so that of
    a budget of 30% some 27% is removed. A span of length 0 inserts a [MASK] anywhere. A special is
    a word of its own.

    Inputs that would exceed `lengths` are drawn again: at 512 tokens about 1 row in 100 of English
    with 7 words to 10 tokens, 1 in 20 at 128 tokens, and 1 in 11 where every token is a word (which
    lowers the mean number of masks by 1%). After 32 draws one span is laid over the densest run of
    words, which always fits: it takes a text that is mostly one word to get there.
    """

    noise_density: float = 0.3
    mean_span_length: float = 3.0
    name: str = "denoising"

    def __post_init__(self):
        require_share(self.name, self.noise_density, 0.5)
        require_span_length(self.name, self.mean_span_length)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        targets = as_row(tokens, 1, self.name)
        tokens, words = permute_sentences(targets, vocabulary, rng)
        bound = self.lengths(len(tokens)).inputs
        budget = self.budget(len(words))
        edges = np.append(words, len(tokens))
        for _ in range(DRAWS):
            lengths = until(rng.poisson(self.mean_span_length, 2 * budget + 8), budget)
            if lengths is None:
                continue
            spans = lengths[lengths > 0]
            first = rng.choice(len(words), len(spans), replace=False)
            last = np.minimum(first + spans, len(words))
            inputs = infill(tokens, edges[first], edges[last], vocabulary.mask)
            inputs = insert(inputs, len(lengths) - len(spans), vocabulary.mask, rng)
            if len(inputs) <= bound:
                return Example(inputs=inputs, targets=targets)
        densest = np.argmax(edges[budget:] - edges[: len(edges) - budget])
        start, end = edges[[densest, densest + budget]]
        inputs = infill(tokens, np.array([start]), np.array([end]), vocabulary.mask)
        return Example(inputs=inputs, targets=targets)

    def budget(self, words: int) -> int:
        """Returns ceil(noise_density·words), the product in float32: of 50 words 16, for 0.3 rounds
        up."""
        return math.ceil(np.float32(words) * np.float32(self.noise_density))

    def lengths(self, raw: int) -> Lengths:
        """Targets exact. Inputs: the mean where every token is a word, and a deviation above it;
        never less than the densest single span leaves.
        """
        density, mean = self.noise_density, self.mean_span_length
        # Variance of the number of spans (renewal theory) and, fitted, of what they cover twice.
        variance = raw * (density / mean**2 + 0.15 * density**2 * mean)
        inputs = raw * share_left(density, mean) + 1 + math.sqrt(variance)
        # 1/density runs of `budget` words cover the row, so one of them holds that share of it.
        longest = raw - math.ceil(raw / math.ceil(1 / density)) + 1
        return Lengths(max(math.floor(inputs), longest), raw)


@cache
def share_left(noise_density: float, mean_span_length: float) -> float:
    """Returns the number of input tokens for each token of a long row of words of one token.

    A word begins a span with probability p, and a span that begins d words before it covers it
    with the probability that its length exceeds d.
    """
    empty = math.exp(-mean_span_length)
    spans = noise_density / mean_span_length
    p, kept, pmf, longer, d = spans * (1 - empty), 1.0, empty, 1 - empty, 0
    mask = 1.0
    while longer > 1e-9:
        free = 1 - p * longer / (1 - empty)
        kept *= free
        mask *= free if d else 1.0
        d += 1
        pmf *= mean_span_length / d
        longer -= pmf
    return kept + p * mask + spans * empty


def infill(tokens: Tokens, starts: np.ndarray, ends: np.ndarray, mask: int) -> np.ndarray:
    """Returns `tokens` with a `mask` for the first token of each span from `starts` to `ends`,
    unless another span covers it, and without the others. Spans may touch and overlap; starts
    differ.
    """
    covered = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.add.at(covered, starts + 1, 1)
    np.add.at(covered, ends, -1)
    masked = tokens.copy()
    masked[starts] = mask
    return masked[np.cumsum(covered[:-1]) == 0]


def insert(tokens: Tokens, count: int, mask: int, rng: Rng) -> np.ndarray:
    """Returns `tokens` and `count` masks among them, uniform over all ways to place these."""
    index = np.sort(rng.choice(len(tokens) + count, count, replace=False))
    return np.insert(tokens, index - np.arange(count), mask)


def permute_sentences(
    tokens: Tokens, vocabulary: Vocabulary, rng: Rng
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens with their sentences shuffled, and the indices at which words begin
    there."""
    starts = sentence_starts(tokens, vocabulary)
    lengths = np.diff(starts, append=len(tokens))
    order = rng.permutation(len(starts))
    index = ranges(starts[order], lengths[order])
    begins = word_starts(tokens, vocabulary)
    begins[starts] = True
    return tokens[index], np.flatnonzero(begins[index])


def middle(before: Tokens, scored: Tokens, after: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """The whole text is generated; what stands before the span is forced."""
    return [forced(join(before, vocabulary.mask, after), before, scored)]


DENOISING = ((1.0, Denoising()),)
