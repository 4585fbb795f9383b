"""How far chance moves a value: 95% intervals and standard errors, over documents and over seeds.

Documents of one cell's value by bootstrap. Seeds by Student's t, for a bootstrap of two or three runs
knows too little of their spread. Two cells by standard errors in pairs, whose p values reach further
than the share of a thousand draws that a bootstrap could count.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from megaarch.evaluation.heldout_scores import Paired

RESAMPLES = 1000
NORMAL_95 = 1.959964  # deviations of a normal distribution on each side of its 95%


def ratio_interval(
    amounts: np.ndarray, sizes: np.ndarray, documents: np.ndarray
) -> list[float] | None:
    """95% interval of sum(amounts) / sum(sizes) when whole documents are drawn again; None where
    there is but one, whose choice tells nothing of others.

    amounts, sizes, documents: [N]. The draws depend on the documents alone, so they are the same
    for every cell.
    """
    names, place = np.unique(documents, return_inverse=True)
    if len(names) < 2:
        return None
    top = np.bincount(place, weights=amounts, minlength=len(names))
    bottom = np.bincount(place, weights=sizes, minlength=len(names))
    draws = np.random.default_rng(0).integers(0, len(names), size=(RESAMPLES, len(names)))
    ratios = top[draws].sum(axis=1) / np.maximum(bottom[draws].sum(axis=1), 1e-12)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return [float(low), float(high)]


class Error(NamedTuple):
    """A standard error and its degrees of freedom."""

    deviation: float
    freedom: float


def share_interval(shares: Sequence[float]) -> list[float] | None:
    """The 95% interval of the mean over items, each a document of its own."""
    number = len(shares)
    return ratio_interval(np.array(shares), np.ones(number), np.arange(number))


def paired_error(a: Paired, b: Paired) -> Error | None:
    """Error of a's value less b's over the choice of documents, by the variance of a ratio over whole
    documents. None where the items differ, and where there is but one document.

    Pairing takes out what makes an item hard for every model.
    """
    if a.documents != b.documents or a.sizes != b.sizes:
        return None
    names, place = np.unique(a.documents, return_inverse=True)
    if len(names) < 2:
        return None
    top = np.bincount(place, weights=np.subtract(a.amounts, b.amounts))
    bottom = np.bincount(place, weights=a.sizes)
    rest = top - top.sum() / bottom.sum() * bottom
    variance = len(names) / (len(names) - 1) * (rest**2).sum() / bottom.sum() ** 2
    return Error(math.sqrt(variance), len(names) - 1)


def paired_difference(a: Paired, b: Paired) -> float:
    """a's value less b's, of the same items; by what each cost, as `paired_error` takes it: values that were rounded
    otherwise would differ where no item does."""
    return (sum(a.amounts) - sum(b.amounts)) / sum(a.sizes)


def seed_error(groups: Sequence[Sequence[float]]) -> Error | None:
    """Error, over seeds alone, of a cell's mean (one group: a value for each seed) or of the
    difference of two (two groups, whose variance is pooled). None where no group has two seeds. An
    empty group has no seeds and adds no spread."""
    groups = [group for group in groups if group]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    squares = sum((x - sum(group) / len(group)) ** 2 for group in groups for x in group)
    variance = squares / freedom * sum(1 / len(group) for group in groups)
    return Error(math.sqrt(variance), freedom)


def p_value(difference: float, errors: Sequence[Error]) -> float:
    """Two-sided p of a difference with independent errors, by Student's t with the degrees of freedom
    of Welch (1947) and Satterthwaite (1946)."""
    variance = sum(error.deviation**2 for error in errors)
    if not variance:
        return float(difference == 0)
    freedom = variance**2 / sum(error.deviation**4 / error.freedom for error in errors)
    return float(2 * stdtr(freedom, -abs(difference) / math.sqrt(variance)))


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which of several hypotheses are rejected, such that one that holds is rejected in at most
    `level` of all studies (Holm 1979)."""
    rejected = [False] * len(p_values)
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > level / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def widened(interval: Sequence[float], value: float, seeds: Error | None) -> list[float]:
    """An interval about `value` with an independent error over seeds: half-widths are added in
    quadrature, each side for itself."""
    half = seeds.deviation * float(stdtrit(seeds.freedom, 0.975)) if seeds else 0.0
    low, high = interval
    return [value - math.hypot(value - low, half), value + math.hypot(high - value, half)]
