"""Spans over a row of tokens: what the objectives share. All vectorized, all on the host.

Spans are (starts, lengths), two int arrays in left-to-right order that do not overlap.
"""

import math
from functools import cache

import numpy as np

from megaarch.data.example import Example, Rng, Tokens, Vocabulary
from megaarch.errors import UserError


def as_row(tokens: Tokens, least: int, name: str) -> np.ndarray:
    """Returns `tokens` as int64 [raw]. UserError where there are fewer than `least` of them."""
    tokens = np.asarray(tokens, dtype=np.int64)
    if tokens.ndim != 1 or len(tokens) < least:
        raise UserError(
            f"{name} needs a row of at least {least} token{'s' * (least > 1)}, "
            f"not shape {list(tokens.shape)}: use a longer row or text"
        )
    return tokens


def require_share(name: str, noise_density: float, largest: float = 1.0) -> None:
    """Raises UserError unless 0 < noise_density < largest (or = largest below 1)."""
    if not 0 < noise_density <= largest or noise_density == 1:
        raise UserError(
            f"{name} needs a noise density above 0 and "
            f"{'below' if largest == 1 else 'at most'} {largest:g}, not {noise_density:g}"
        )


def require_span_length(name: str, mean_span_length: float) -> None:
    """Raises UserError unless mean_span_length >= 1."""
    if not 1 <= mean_span_length < math.inf:
        raise UserError(f"{name} needs a mean span length of at least 1, not {mean_span_length:g}")


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the indices of all spans, one after the other, in the order given."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def replace_spans(
    tokens: Tokens, starts: np.ndarray, lengths: np.ndarray, mask: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `tokens` with one `mask` for each span, and the masks' indices in the result."""
    before = starts - (np.cumsum(lengths) - lengths)  # tokens that stay before each span
    corrupted = np.insert(np.delete(tokens, ranges(starts, lengths)), before, mask)
    return corrupted, before + np.arange(len(starts))


def split(tokens: Tokens, shortest: int, mirrored: bool, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens before and behind a place that is drawn uniformly from `shortest` to raw - 1.
    mirrored: the other way round for the same draw, the longest first part for the shortest."""
    place = int(rng.integers(shortest, len(tokens)))
    if mirrored:
        place = shortest + len(tokens) - 1 - place
    return tokens[:place], tokens[place:]


def word_starts(tokens: Tokens, vocabulary: Vocabulary) -> np.ndarray:
    """Returns bool [raw]: where a word begins. A special is a word of its own, and the row begins
    one."""
    text = vocabulary.text[tokens]
    starts = vocabulary.word_start[tokens] | ~text
    starts[1:] |= ~text[:-1]
    starts[:1] = True
    return starts


def sentence_starts(tokens: Tokens, vocabulary: Vocabulary) -> np.ndarray:
    """Returns indices at which sentences begin, the first of them 0.

    A sentence ends after a run of sentence-ending tokens ("." and a newline stay together), at
    the end of a document and at the end of the row.
    """
    ends = vocabulary.sentence_end[tokens] | (tokens == vocabulary.eos)
    last = np.flatnonzero(ends[:-1] & ~ends[1:])
    return np.concatenate([[0], last + 1])


@cache
def restricted_poisson(mean: float, largest: int) -> np.ndarray:
    """Returns probabilities of 1..largest under Poisson(mean) restricted to them."""
    k = np.arange(1, largest + 1)
    log_p = k * math.log(mean) - np.array([math.lgamma(i + 1) for i in k])
    p = np.exp(log_p - log_p.max())
    return p / p.sum()


def draw_lengths(probabilities: np.ndarray, count: int, rng: Rng) -> np.ndarray:
    """Returns `count` draws of 1..n with these probabilities [n]."""
    edges = np.cumsum(probabilities)[:-1]
    return 1 + np.searchsorted(edges, rng.random(count), side="right")


def until(lengths: np.ndarray, budget: int, surplus: int = 0) -> np.ndarray | None:
    """Returns the shortest run from the front that sums to at least `budget`; None if all do not.

    Its last length is trimmed so that the sum is at most budget + surplus.
    """
    sums = np.cumsum(lengths)
    count = int(np.searchsorted(sums, budget)) + 1
    if count > len(lengths):
        return None
    chosen = lengths[:count].copy()
    chosen[-1] -= max(0, int(sums[count - 1]) - budget - surplus)
    return chosen


def join(*pieces: int | np.ndarray) -> np.ndarray:
    """Returns one int64 array of tokens and arrays of tokens."""
    return np.concatenate([np.atleast_1d(np.asarray(piece, dtype=np.int64)) for piece in pieces])


def forced(inputs: Tokens, given: int | np.ndarray, scored: Tokens) -> Example:
    """Returns targets `given` (weight 0) and then `scored` (weight 1)."""
    targets = join(given, scored)
    return Example(inputs, targets, weights=np.arange(len(targets)) >= len(targets) - len(scored))
