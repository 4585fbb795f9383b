"""Language modelling: predict a text, or what follows a prefix of it. And supervised pairs."""

from dataclasses import dataclass

import numpy as np

from megaarch.data.example import Example, Lengths, Rng, Tokens, Vocabulary
from megaarch.data.objectives.spans import as_row, join, split


@dataclass(frozen=True)
class FullLM:
    """Every token is a target (Radford et al. 2019)."""

    name: str = "full_lm"

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 1, self.name)
        return Example(inputs=tokens[:0], targets=tokens)

    def lengths(self, raw: int) -> Lengths:
        """Exact."""
        return Lengths(0, raw, total=raw)


@dataclass(frozen=True)
class PrefixLM:
    """A split s uniform in [1, raw): the first s tokens are inputs, the others targets
    (Liu et al. 2018; Raffel et al. 2020, 3.2.1; Wang et al. 2022, appendix D).

    mirrored: split at raw - s for the same draw. Two examples of one generator, the second
    mirrored, fill an encoder row and a decoder row of `raw` tokens each (Wang et al. 2022).
    predict_inputs: as Example's; a causal decoder's rows then are full_lm's.
    """

    mirrored: bool = False
    predict_inputs: bool = False
    name: str = "prefix_lm"

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 2, self.name)
        inputs, targets = split(tokens, 1, self.mirrored, rng)
        return Example(inputs, targets, predict_inputs=self.predict_inputs)

    def lengths(self, raw: int) -> Lengths:
        """Each side takes up to raw - 1; together they are exactly raw."""
        raw = max(raw, 2)
        return Lengths(raw - 1, raw - 1, total=raw, predict_inputs=self.predict_inputs)

    def pair(self, raw: int) -> Lengths:
        """Exactly what two examples of one draw take, of which one is mirrored."""
        return Lengths(raw, raw)


def supervised(inputs: Tokens, targets: Tokens, vocabulary: Vocabulary) -> Example:
    """Returns an {input, target} pair: inputs [n] as they are, targets [m] and the end token."""
    inputs = np.asarray(inputs, dtype=np.int64)
    return Example(inputs=inputs, targets=np.append(targets, vocabulary.eos).astype(np.int64))


def continuation(prefix: Tokens, scored: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """Scores what follows the prefix."""
    return [Example(prefix, scored)]


def supervised_continuation(
    prefix: Tokens, scored: Tokens, vocabulary: Vocabulary
) -> list[Example]:
    """Scores the target of a prefix that is a whole input."""
    return [Example(join(prefix, vocabulary.eos), scored)]


FULL_LM = ((1.0, FullLM()),)
PREFIX_LM = ((1.0, PrefixLM()),)
