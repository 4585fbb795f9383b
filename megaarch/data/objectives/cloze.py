"""Cloze: masked tokens are predicted at their own places (BERT, UniLM).

Of the chosen tokens 80% become [MASK], 10% a random token of text and 10% stay as they are.
Specials (an end of document inside the row) are never chosen.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megaarch.data.example import Example, Lengths, Rng, Tokens, Vocabulary
from megaarch.data.objectives.spans import as_row, join, require_share, word_starts


@dataclass(frozen=True)
class MaskedLM:
    """BERT (Devlin et al. 2019, 3.1 and appendix A.1), masks drawn anew for each sample.

    n = round(raw·noise_density) tokens are chosen, at least 1, at most `max_predictions`, and no
    more than there are tokens of text.
    whole_word_masking: choose whole words in random order, passing over those that would exceed n. The
    count then may fall short of n where only long words are left.
    """

    noise_density: float = 0.15
    max_predictions: int | None = None
    whole_word_masking: bool = False
    name: str = "masked_lm"

    def __post_init__(self):
        require_share(self.name, self.noise_density)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 1, self.name)
        budget = self.lengths(len(tokens)).targets
        if self.whole_word_masking:
            chosen = choose_words(tokens, budget, vocabulary, rng)
        else:
            candidates = np.flatnonzero(vocabulary.text[tokens])
            chosen = rng.choice(candidates, min(budget, len(candidates)), replace=False)
        places = np.sort(chosen)
        return Example(corrupt(tokens, places, vocabulary, rng), tokens[places], places=places)

    def lengths(self, raw: int) -> Lengths:
        """Exact, unless whole words or too few tokens of text lower the targets."""
        return Lengths(raw, budget_of(raw, self.noise_density, self.max_predictions), in_place=True)


@dataclass(frozen=True)
class UniLM:
    """One of UniLM's four (Dong et al. 2019, 2.3): the same cloze under another mask.

    direction: "bidirectional" (all see all), "seq2seq" (a prefix, uniform in [1, raw), sees
    itself; the rest is left to right), "left_to_right" or "right_to_left".
    n as for BERT; the chosen are unigrams 80% of the time, else bigrams or trigrams alike. An
    n-gram stops short at a special, at the row's end and at the budget.
    """

    direction: Literal["bidirectional", "seq2seq", "left_to_right", "right_to_left"]
    noise_density: float = 0.15
    name: str = "unilm"

    def __post_init__(self):
        require_share(self.name, self.noise_density)

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        seq2seq = self.direction == "seq2seq"
        tokens = as_row(tokens, 1 + seq2seq, self.name)
        places = choose_ngrams(tokens, self.lengths(len(tokens)).targets, vocabulary, rng)
        prefix = None if self.direction == "bidirectional" else 0
        if seq2seq:
            prefix = int(rng.integers(1, len(tokens)))
        return Example(
            inputs=corrupt(tokens, places, vocabulary, rng),
            targets=tokens[places],
            places=places,
            prefix=prefix,
            reverse=self.direction == "right_to_left",
        )

    def lengths(self, raw: int) -> Lengths:
        """Exact, unless there is too little text."""
        return Lengths(raw, budget_of(raw, self.noise_density), in_place=True)


def budget_of(raw: int, noise_density: float, largest: int | None = None) -> int:
    """Returns round(raw·noise_density), halves to even, at least 1 and at most `largest`."""
    budget = max(round(raw * noise_density), 1)
    return budget if largest is None else min(budget, largest)


def corrupt(tokens: Tokens, places: np.ndarray, vocabulary: Vocabulary, rng: Rng) -> np.ndarray:
    """Returns a copy with the tokens at `places` masked, replaced or kept, 80 : 10 : 10."""
    inputs = tokens.copy()
    draw = rng.random(len(places))
    inputs[places[draw < 0.8]] = vocabulary.mask
    swapped = places[(draw >= 0.8) & (draw < 0.9)]
    if len(swapped):
        inputs[swapped] = rng.choice(np.flatnonzero(vocabulary.text), len(swapped))
    return inputs


def choose_words(tokens: Tokens, budget: int, vocabulary: Vocabulary, rng: Rng) -> np.ndarray:
    """Returns indices of whole words in random order that together do not exceed `budget`."""
    starts = np.flatnonzero(word_starts(tokens, vocabulary))
    lengths = np.diff(starts, append=len(tokens))
    words = np.flatnonzero(vocabulary.text[tokens[starts]])
    chosen: list[int] = []
    for word in rng.permutation(words).tolist():
        if len(chosen) + lengths[word] <= budget:
            chosen.extend(range(starts[word], starts[word] + lengths[word]))
        if len(chosen) == budget:
            break
    return np.array(chosen, dtype=np.int64)


def choose_ngrams(tokens: Tokens, budget: int, vocabulary: Vocabulary, rng: Rng) -> np.ndarray:
    """Returns sorted indices of unigrams (80%), bigrams (10%) and trigrams (10%), `budget` in
    all."""
    text = vocabulary.text[tokens].tolist()
    starts = rng.permutation(np.flatnonzero(text))
    sizes = 1 + np.searchsorted([0.8, 0.9], rng.random(len(starts)), side="right")
    chosen: set[int] = set()
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        if len(chosen) == budget:
            break
        if start in chosen:
            continue
        for place in range(start, min(start + size, len(text))):
            if not text[place] or len(chosen) == budget:
                break
            chosen.add(place)
    return np.array(sorted(chosen), dtype=np.int64)


def left_to_right(prefix: Tokens, scored: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """UniLM's seq2seq form: the next token is a [MASK] at the end of what is known."""
    return [
        one_place(join(prefix, scored[:j], vocabulary.mask), len(prefix) + j, token, len(prefix))
        for j, token in enumerate(scored)
    ]


def one_at_a_time(prefix: Tokens, scored: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """BERT's pseudo-likelihood: everything but the one token is seen (Salazar et al. 2020)."""
    text = join(prefix, scored)
    return [
        one_place(join(text[:place], vocabulary.mask, text[place + 1 :]), place, text[place])
        for place in range(len(prefix), len(text))
    ]


def middle(before: Tokens, scored: Tokens, after: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """All tokens see each other, and what is not yet known is [MASK]."""
    masks = np.full(len(scored), vocabulary.mask)
    return [
        one_place(join(before, scored[:j], masks[j:], after), len(before) + j, token)
        for j, token in enumerate(scored)
    ]


def one_place(inputs: Tokens, place: int, target: int, prefix: int | None = None) -> Example:
    """Returns an example of one target at one place."""
    return Example(inputs, join(target), places=np.array([place]), prefix=prefix)


MASKED_LM = ((1.0, MaskedLM()),)
UNILM = (
    (1 / 3, UniLM("bidirectional")),
    (1 / 3, UniLM("seq2seq")),
    (1 / 6, UniLM("left_to_right")),
    (1 / 6, UniLM("right_to_left")),
)
