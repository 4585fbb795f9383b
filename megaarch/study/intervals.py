"""95% intervals: documents by bootstrap, for one cell's value and for two cells in pairs; seeds by
Student's t, for a bootstrap of two or three runs knows too little of their spread."""

import math
from collections.abc import Sequence

import numpy as np

from megaarch.study.results import Paired

RESAMPLES = 1000
# Student's t, two-sided 95%, for 1 to 10 degrees of freedom.
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


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


def paired_interval(a: Paired, b: Paired) -> list[float] | None:
    """95% interval of a's value less b's over the same items, or None where items differ.

    Pairing takes out what makes an item hard for every model.
    """
    if a.documents != b.documents or a.sizes != b.sizes:
        return None
    difference = np.subtract(a.amounts, b.amounts)
    return ratio_interval(difference, np.asarray(a.sizes), np.asarray(a.documents))


def seed_half_width(groups: Sequence[Sequence[float]]) -> float:
    """Half of the interval, over seeds alone, of a cell's mean (one group: a value for each seed) or
    of the difference of two (two groups, whose variance is pooled). 0 where none has two seeds. An empty group has no seeds and adds no spread."""
    groups = [group for group in groups if group]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return 0.0
    squares = sum((x - sum(group) / len(group)) ** 2 for group in groups for x in group)
    error = math.sqrt(squares / freedom * sum(1 / len(group) for group in groups))
    return student_t(freedom) * error


def widened(interval: Sequence[float], value: float, half: float) -> list[float]:
    """An interval about `value` with another, independent source of error: half-widths are added
    in quadrature, each side for itself."""
    low, high = interval
    return [value - math.hypot(value - low, half), value + math.hypot(high - value, half)]


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t (Abramowitz and Stegun 26.7.5 above 10 degrees)."""
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    z, v = 1.959964, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
