"""Permutation language modelling (XLNet): some tokens are predicted in a random order.

raw       a b c d e f g h i j k l         windows of 6·1 and 6·1 tokens
targets       c           i               in permuted order, say i then c
i sees all but c, i; c sees all but c
"""

from dataclasses import dataclass

import numpy as np

from megaarch.data.example import Example, Lengths, Vocabulary
from megaarch.data.objectives.spans import as_row, draw_lengths, ranges, until


@dataclass(frozen=True)
class PermutationLM:
    """round(raw / alpha) targets, at least 1, in spans (Yang et al. 2019, 2.3 and appendix A.4).

    A span has n = 1..longest tokens with probability proportional to 1/n and lies, uniformly, in
    a window of alpha·n tokens of its own; the windows tile the row (one of them takes up what the
    division leaves). The last span drawn is trimmed to the number of targets. The targets' order
    is uniform; all other tokens are context, seen by all and seeing no target.
    """

    alpha: int = 6
    longest: int = 5
    name: str = "permutation_lm"

    def __post_init__(self):
        if self.alpha < 2 or self.longest < 1:
            raise ValueError(
                f"permutation_lm needs alpha of at least 2 and longest of at least 1, "
                f"not {self.alpha} and {self.longest}"
            )

    def __call__(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Example:
        tokens = as_row(tokens, 1, self.name)
        count = self.lengths(len(tokens)).targets
        weights = 1 / np.arange(1, self.longest + 1)
        sizes = rng.permutation(until(draw_lengths(weights / weights.sum(), count, rng), count))
        windows = self.alpha * sizes
        windows[rng.integers(len(sizes))] += len(tokens) - self.alpha * count
        offsets = rng.integers(windows - sizes, endpoint=True)
        chosen = ranges(np.cumsum(windows) - windows + offsets, sizes)
        places = rng.permutation(chosen)
        return Example(inputs=tokens, targets=tokens[places], places=places, permuted=True)

    def lengths(self, raw: int) -> Lengths:
        """Exact."""
        return Lengths(raw, max(round(raw / self.alpha), 1), in_place=True)
