"""Estimates over rows and seeds, and records that are put together of several seeds."""

import numpy as np
import pytest
from scipy import stats

from megaarch.evaluation.record_schema import Record
from megaarch.probes.estimate import Estimate, merged, over_rows, over_seeds


def test_a_mean_counts_rows_and_leaves_out_what_is_not_known():
    found = over_rows(np.array([1.0, 3.0, np.nan, 5.0]), np.array([0, 1, 2, 3]))
    assert found.value == pytest.approx(3.0)
    assert found.items == 3
    low, high = found.ends
    assert low < 3.0 < high
    assert over_rows(np.array([np.nan]), np.array([0])).value is None
    assert over_rows(np.array([1.0, 2.0]), np.array([7, 7])).interval is None  # one document


def test_seeds_widen_the_interval_by_students_t():
    alike = [Estimate(value=v, interval=[v, v], items=4) for v in (1.0, 2.0, 3.0)]
    found = over_seeds(alike)
    half = stats.t.ppf(0.975, 2) * 1.0 / np.sqrt(3)  # deviation 1 over three seeds
    assert found.value == pytest.approx(2.0)
    assert found.interval == pytest.approx([2 - half, 2 + half])
    assert found.seeds == [1.0, 2.0, 3.0]
    wide = [Estimate(value=2.0, interval=[1.5, 2.5]) for _ in range(3)]
    assert over_seeds(wide).interval == pytest.approx([1.5, 2.5])  # rows alone: seeds are equal


def test_a_seed_without_a_value_leaves_the_mean_without_one():
    """As the yardsticks of a study do (`Yardstick.score`)."""
    found = over_seeds([Estimate(value=1.0, interval=[0, 2], items=4), Estimate(value=None)])
    assert (found.value, found.interval, found.seeds) == (None, None, [1.0])


class Inner(Record):
    layers: list[Estimate]


class Outer(Record):
    inner: Inner
    by_name: dict[str, Estimate]
    chance: float


def test_records_are_put_together_leaf_by_leaf():
    def one(value: float) -> Outer:
        return Outer(
            inner=Inner(layers=[Estimate(value=value), Estimate(value=10 * value)]),
            by_name={"a": Estimate(value=-value)},
            chance=0.25,
        )

    found = merged([one(1.0), one(3.0)])
    assert [e.value for e in found.inner.layers] == [2.0, 20.0]
    assert found.by_name["a"].seeds == [-1.0, -3.0]
    assert found.chance == 0.25
    assert merged([one(1.0)]) == one(1.0)
