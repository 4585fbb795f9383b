"""Permutation language modelling (XLNet): some tokens are predicted in a random order.

raw       a b c d e f g h i j k l m n     windows of 7·1 and 7·1 tokens
targets       c             j               in permuted order, say j then c
j sees all but c, j; c sees all but c
"""

from dataclasses import dataclass

import numpy as np

from megaarch.data.example import Example, Lengths, Rng, Tokens, Vocabulary
from megaarch.data.objectives.spans import as_row, draw_lengths, join, word_starts
from megaarch.errors import UserError


@dataclass(frozen=True)
class PermutationLM:
    """round(raw / alpha) targets, at least 1 (Yang et al. 2019, 2.3 and appendix A.4; spans as
    _sample_mask of XLNet's data_utils.py places them).

    From left to right, each span has n = 1..longest tokens with probability proportional to 1/n, cut
    to the targets that are still missing, and alpha·n tokens of context: uniformly 0 to alpha·n - 1
    of them before it, the others after it. It begins at the next start of a word, and its last
    token is not the row's last. The targets that no span took are single tokens, drawn uniformly
    from the rest: at 512 tokens 12 of 85 where every token is a word, 14 of words of 1.4 tokens. The
    targets' order is uniform; all other tokens are context, seen by all and seeing no target.
    """

    alpha: int = 6
    longest: int = 5
    name: str = "permutation_lm"

    def __post_init__(self):
        if self.alpha < 2 or self.longest < 1:
            raise UserError(
                f"permutation_lm needs alpha of at least 2 and longest of at least 1, "
                f"not {self.alpha} and {self.longest}"
            )

    def __call__(self, tokens: Tokens, vocabulary: Vocabulary, rng: Rng) -> Example:
        tokens = as_row(tokens, 1, self.name)
        chosen = self.spans(word_starts(tokens, vocabulary), rng)
        rest = np.flatnonzero(~chosen)
        missing = self.lengths(len(tokens)).targets - int(chosen.sum())
        chosen[rng.choice(rest, missing, replace=False)] = True
        places = rng.permutation(np.flatnonzero(chosen))
        return Example(inputs=tokens, targets=tokens[places], places=places, permuted=True)

    def spans(self, starts: np.ndarray, rng: Rng) -> np.ndarray:
        """Returns bool [raw]: the tokens of all spans. starts: bool [raw], where words begin."""
        raw, missing = len(starts), self.lengths(len(starts)).targets
        begins = np.append(np.flatnonzero(starts), raw)
        following = begins[np.searchsorted(begins, np.arange(raw + 1))].tolist()
        weights = 1 / np.arange(1, self.longest + 1)
        drawn = draw_lengths(weights / weights.sum(), missing, rng).tolist()
        shares = rng.random(missing).tolist()
        chosen = np.zeros(raw, dtype=bool)
        window = 0  # where it begins
        for size, share in zip(drawn, shares, strict=True):
            size = min(size, missing)
            before = int(share * self.alpha * size)
            begin = following[min(window + before, raw)]
            if not size or begin + size >= raw:
                break
            chosen[begin : begin + size] = True
            missing -= size
            window = begin + size + self.alpha * size - before
        return chosen

    def lengths(self, raw: int) -> Lengths:
        """Exact."""
        return Lengths(raw, max(round(raw / self.alpha), 1), in_place=True)


def middle(before: Tokens, scored: Tokens, after: Tokens, vocabulary: Vocabulary) -> list[Example]:
    """Both sides are context; the scored tokens come in order."""
    places = len(before) + np.arange(len(scored))
    return [Example(join(before, scored, after), scored, places=places, permuted=True)]


PERMUTATION_LM = ((1.0, PermutationLM()),)
