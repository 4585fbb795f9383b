"""Which of two architectures is better at which budget, by their laws: each at its compute-optimal size."""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.special import ndtri, stdtrit

from megaarch.scaling.law import NAMES, Fit, Law

LEVEL = 0.975  # of the interval at each of the two ends, so that both hold at once in 95%
STEPS = 512  # budgets between the ends at which a crossing is looked for


@dataclass(frozen=True)
class Comparison:
    """budgets: lowest and highest FLOPs that both have points at. differences: of the loss of `first` less
    that of `second` at both, with their intervals. crossing: the budget from which the other one is
    better, with its interval, where each is better at one end. documents: whether the intervals hold the choice
    of held-out documents, which are drawn again for both at once."""

    first: str
    second: str
    budgets: tuple[float, float]
    differences: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]
    crossing: float | None = None
    crossing_interval: tuple[float, float] | None = None
    documents: bool = False

    @property
    def better(self) -> tuple[str | None, str | None]:
        """Who is better at the lowest and the highest budget; None where that cannot be told."""
        low, high = (
            self.first if high < 0 else self.second if low > 0 else None
            for low, high in self.intervals
        )
        return low, high

    @property
    def different(self) -> bool:
        return self.better != (None, None)


def comparisons(fits: dict[str, Fit]) -> list[Comparison]:
    """Compares each two of these fits whose budgets overlap."""
    pairs = (compare(fits[a], fits[b]) for a, b in combinations(fits, 2))
    return [found for found in pairs if found is not None]


def compare(first: Fit, second: Fit) -> Comparison | None:
    """Returns None where no budget lies within the points of both."""
    flops = first.points.flops, second.points.flops
    low, high = max(map(np.min, flops)), min(map(np.max, flops))
    if low > high:
        return None
    budgets = np.geomspace(low, high, STEPS)
    found = first.law.best_loss(budgets) - second.law.best_loss(budgets)
    resampled = _differences(first, second, budgets)
    widened = max(_widened(*sample) for one in (first, second) for sample in one.resampled)
    edges = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    bounds = found + widened * (edges - found)
    of = Comparison(
        first.points.name,
        second.points.name,
        (float(low), float(high)),
        (float(found[0]), float(found[-1])),
        ((bounds[0, 0].item(), bounds[1, 0].item()), (bounds[0, -1].item(), bounds[1, -1].item())),
        documents=None not in (first.points.documents, second.points.documents),
    )
    if None in of.better or of.better[0] == of.better[1]:
        return of
    crossing = _crossings(found[None], budgets)[0]
    edges = np.quantile(_crossings(resampled, budgets), (0.025, 0.975))
    low, high = crossing * (edges / crossing) ** widened  # budgets differ by factors
    return replace(of, crossing=crossing.item(), crossing_interval=(low.item(), high.item()))


def _widened(number: int, free: int) -> float:
    """By how much quantiles of resamples of so many points or documents are widened: residuals are smaller
    than what they estimate, and their size is itself an estimate (Student's t over the normal quantile)."""
    tail = (1 + LEVEL) / 2
    return float(np.sqrt(number / free) * stdtrit(free, tail) / ndtri(tail))


def _differences(first: Fit, second: Fit, budgets: np.ndarray) -> np.ndarray:
    """[R, budgets]: of the resamples that both have, which are of the same documents."""
    _, *places = np.intersect1d(first.draws, second.draws, return_indices=True)
    losses = [
        Law(*(getattr(one.resamples, n)[place, None] for n in NAMES)).best_loss(budgets)
        for one, place in zip((first, second), places, strict=True)
    ]
    return losses[0] - losses[1]


def _crossings(differences: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The first budget at which the sign changes, between two of those that are looked at; those
    resamples left out in which it does not."""
    changes = np.sign(differences[:, 1:]) != np.sign(differences[:, :-1])
    rows = np.flatnonzero(changes.any(axis=1))
    place = changes[rows].argmax(axis=1)
    before, after = differences[rows, place], differences[rows, place + 1]
    share = before / (before - after)
    return budgets[place] * (budgets[place + 1] / budgets[place]) ** share
