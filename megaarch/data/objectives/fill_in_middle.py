"""Fill in the middle: the middle of a text moves behind its two sides (Bavarian et al. 2022, 3).

raw      a b c d e f               cut into  a b | c d | e f
PSM      <0> a b <1> e f <2> c d <eos>       prefix, suffix, middle
SPM      <0> <1> e f <2> a b c d <eos>       suffix, prefix, middle (appendix D)

Sentinels 0, 1 and 2 are the paper's <PRE>, <SUF> and <MID>, and eos its <EOT>. The middle and eos are
the targets. A causal decoder predicts the inputs too, as published; in a prefix decoder they see each
other, packed:

    causal_decoder   tokens    ^   <0> a   b   <1> e   f   <2> c  d     | ^ ...   C[0:10; 0:10]
                     targets   <0> a   b   <1> e   f   <2> c   d  <eos>

    prefix_decoder   tokens    ^   <0> a   b   <1> e   f   <2> c  d     | ^ ...   R[0:8; 0:8] +
                     targets   .   .   .   .   .   .   .   c   d  <eos>           C[8:10; 0:10]
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megaarch.data.example import Example, Lengths, Rng, Tokens, Vocabulary
from megaarch.data.objectives.language_modelling import PrefixLM
from megaarch.data.objectives.spans import as_row, join
from megaarch.errors import UserError


@dataclass(frozen=True)
class FillInMiddle:
    """Both cuts are uniform over the row's tokens and its ends, so that a piece may be empty.

    order: in which the two sides stand, psm or spm.
    """

    order: Literal["psm", "spm"]
    name: str = "fill_in_middle"

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 1, self.name)
        cuts = np.sort(rng.integers(len(tokens) + 1, size=2))
        prefix, scored, suffix = np.split(tokens, cuts)
        sides = psm if self.order == "psm" else spm
        return Example(
            sides(prefix, suffix, vocabulary), join(scored, vocabulary.eos), predict_inputs=True
        )

    def lengths(self, raw: int) -> Lengths:
        """Bounds; inputs and targets together are exactly raw + 4."""
        return Lengths(raw + 3, raw + 1, total=raw + 4, predict_inputs=True)


def psm(prefix: Tokens, suffix: Tokens, vocabulary: Vocabulary) -> Tokens:
    pre, suf, mid = (vocabulary.sentinel(k) for k in range(3))
    return join(pre, prefix, suf, suffix, mid)


def spm(prefix: Tokens, suffix: Tokens, vocabulary: Vocabulary) -> Tokens:
    pre, suf, mid = (vocabulary.sentinel(k) for k in range(3))
    return join(pre, suf, suffix, mid, prefix)


def mixture(fim_rate: float = 0.5) -> tuple[tuple[float, PrefixLM | FillInMiddle], ...]:
    """Returns the components: a share `fim_rate` of the rows is PSM and SPM, half and half, the others
    are left to right: full_lm of a causal decoder, prefix_lm of a prefix decoder.

    UserError unless 0 < fim_rate <= 1.
    """
    if not 0 < fim_rate <= 1:
        raise UserError(
            f"fill_in_middle needs a fim_rate above 0 and at most 1, not {fim_rate:g}: without "
            "middles it is full_lm or prefix_lm"
        )
    left_to_right = PrefixLM(predict_inputs=True, name="fill_in_middle")
    components = (
        (1 - fim_rate, left_to_right),
        (fim_rate / 2, FillInMiddle("psm")),
        (fim_rate / 2, FillInMiddle("spm")),
    )
    return tuple(component for component in components if component[0])


def middle(before: Tokens, scored: Tokens, after: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """Scores the middle of PSM."""
    return [Example(psm(before, after, vocabulary), scored)]
