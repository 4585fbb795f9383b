"""How far chance moves a value: 95% intervals and standard errors, over documents and over seeds.

Documents of one cell's value by bootstrap. Seeds by Student's t, for a bootstrap of two or three runs
knows too little of their spread. Two cells by standard errors in pairs, whose p values reach further
than the share of a thousand draws that a bootstrap could count, and the spread of runs of all cells
that are compared.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import chdtri, stdtrit

from megaarch.evaluation.heldout_scores import Paired

RESAMPLES = 1000
WIDEST = 2.0
SMALLEST = -30.0  # power of ten: a p below is 0
MANY = 1e9  # degrees of freedom of an error that is taken as known
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


def seed_error(values: Sequence[float]) -> Error | None:
    """Error, over seeds alone, of a cell's mean, by its own spread: a value for each seed. None below two."""
    own = run_error([values])
    return Error(own.deviation / math.sqrt(len(values)), own.freedom) if own else None


def run_error(groups: Sequence[Sequence[float]]) -> Error | None:
    """Deviation of one run from the mean of its cell, as all cells together know it; None where none has two seeds.

    groups: of each cell, a value for each seed. Variances are pooled, but one that is far from the rest
    moves the pool no further than to WIDEST of what their median says, which a diverged cell does not move.
    """
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    freedom = np.array([len(group) - 1 for group in groups])
    variances = np.array([np.var(group, ddof=1) for group in groups])
    pooled = float(freedom @ variances / freedom.sum())
    middle = float(np.median(variances * freedom / chdtri(freedom, 0.5)))
    if middle:  # 0: of most cells all seeds are equal
        pooled = min(pooled, WIDEST * middle)
    return Error(math.sqrt(pooled), int(freedom.sum()))


def difference_over_seeds(groups: Sequence[Sequence[float]], run: Error | None) -> Error | None:
    """Error, over seeds, of the difference of two means. run: `run_error` of all cells that are compared; a
    cell's own variance counts where it is larger, for that of two or three seeds comes out small by chance.
    A cell of one seed has that of the others, an empty group (what is no run) none."""
    if run is None:
        return None
    own = [np.var(group, ddof=1) if len(group) > 1 else 0.0 for group in groups]
    variance = sum(
        max(float(v), run.deviation**2) / len(group)
        for v, group in zip(own, groups, strict=True)
        if group
    )
    return Error(math.sqrt(variance), run.freedom)


def p_value(difference: float, errors: Sequence[Error]) -> float:
    """Two-sided p of a difference with independent errors: the level at which the squares of their half-widths,
    each by Student's t with its own degrees of freedom, sum to that of the difference (Banerjee 1960). A
    normal value is rejected at no more than the level, however the variances stand to each other."""
    errors = [error for error in errors if error.deviation]
    if not errors or not difference:
        return float(difference == 0)

    def lacks(power: float) -> float:
        half = [float(stdtrit(e.freedom, 10**power / 2)) * e.deviation for e in errors]
        return math.hypot(*half) - abs(difference)

    if lacks(SMALLEST) < 0:
        return 0.0
    # half a second to import, which each start of a run would take, and few compare anything
    from scipy.optimize import brentq

    power: Any = brentq(lacks, SMALLEST, 0.0)
    return 10.0**power


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
    half, (low, high) = _half_width(seeds), interval
    return [value - math.hypot(value - low, half), value + math.hypot(high - value, half)]


def documents_error(interval: Sequence[float], value: float, seeds: Error | None) -> Error:
    """The error over documents of an interval that `widened` made with this error over seeds."""
    squares = [max((end - value) ** 2 - _half_width(seeds) ** 2, 0.0) for end in interval]
    return Error(sum(map(math.sqrt, squares)) / 2 / NORMAL_95, MANY)


def _half_width(error: Error | None) -> float:
    return error.deviation * float(stdtrit(error.freedom, 0.975)) if error else 0.0
