"""A measured value with its interval, over rows and over seeds, and records that are made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from megaarch.evaluation.confidence_intervals import ratio_interval, seed_error, widened
from megaarch.evaluation.record_schema import Interval, Number, Record


class Estimate(Record):
    """A value, its 95% interval (None where one row or one document is all there is), the rows that it
    is a mean of, and its value for each seed that has one, where there are several."""

    value: Number
    interval: Interval = None
    items: int = 0
    seeds: list[float] = Field(default_factory=list)

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; without one, the value twice."""
        assert self.value is not None
        low, high = self.interval or (self.value, self.value)
        return low, high


def over_rows(values: np.ndarray, documents: np.ndarray) -> Estimate:
    """Returns the mean of `values` [N], with the interval of drawing whole documents again.

    documents: [N], which document each is of. A value that is NaN counts nowhere.
    """
    known = ~np.isnan(values)
    values, documents = values[known].astype(float), documents[known]
    if not len(values):
        return Estimate(value=None)
    return ratio(values, np.ones_like(values), documents)


def ratio(amounts: np.ndarray, sizes: np.ndarray, documents: np.ndarray) -> Estimate:
    """Returns the sum of `amounts` [N] over that of `sizes` [N], with the interval of drawing whole documents
    again."""
    interval = ratio_interval(amounts, sizes, documents)
    return Estimate(value=float(amounts.sum() / sizes.sum()), interval=interval, items=len(amounts))


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the mean over seeds; none where a seed has no value, for a mean of the others would favour a model
    that diverged. Its interval adds the spread over seeds (Student's t) to that over rows, which the seeds share."""
    if len(estimates) == 1:
        return estimates[0]
    seeds = [e.value for e in estimates if e.value is not None]
    items = max(e.items for e in estimates)
    if len(seeds) < len(estimates):
        return Estimate(value=None, items=items, seeds=seeds)
    value = sum(seeds) / len(seeds)
    intervals = np.array([e.interval for e in estimates if e.interval is not None])
    within = (intervals.mean(axis=0) - np.mean(seeds) + value) if len(intervals) else [value, value]
    spread = seed_error(seeds)
    interval = widened(list(within), value, spread) if spread or len(intervals) else None
    return Estimate(value=value, interval=interval, items=items, seeds=seeds)


def merged(found: Sequence[Any]) -> Any:
    """Returns one record of those of several seeds: estimates are put together, the rest is the first's.

    All have the same fields, keys and lengths.
    """
    first = found[0]
    if isinstance(first, Estimate):
        return over_seeds(found)
    if isinstance(first, Record):
        fields = {
            name: merged([getattr(f, name) for f in found]) for name in type(first).model_fields
        }
        return type(first).model_validate(fields)
    if isinstance(first, dict):
        return {key: merged([f[key] for f in found]) for key in first}
    if isinstance(first, list):
        return [merged(each) for each in zip(*found, strict=True)]
    return first
