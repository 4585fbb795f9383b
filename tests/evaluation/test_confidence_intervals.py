"""Intervals, standard errors and p values, against textbooks."""

import math

import numpy as np
import pytest
from scipy import stats

from megaarch.evaluation.confidence_intervals import (
    Error,
    difference_over_seeds,
    documents_error,
    holm,
    p_value,
    paired_error,
    ratio_interval,
    run_error,
    seed_error,
    widened,
)
from megaarch.evaluation.heldout_scores import Paired


def test_the_interval_shrinks_with_documents_and_holds_the_mean():
    rng = np.random.default_rng(0)
    for n in (20, 2000):
        values = rng.normal(5.0, 1.0, n)
        low, high = ratio_interval(values, np.ones(n), np.arange(n))
        assert low < 5.0 < high
        assert high - low == pytest.approx(2 * 1.96 / math.sqrt(n), rel=0.4)


def test_more_items_of_the_same_documents_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    values, sizes, documents = rng.normal(5.0, 1.0, 40), rng.uniform(1, 3, 40), np.arange(40)
    wanted = ratio_interval(values, sizes, documents)
    repeated = ratio_interval(*(np.repeat(x, 5) for x in (values, sizes, documents)))
    assert repeated == pytest.approx(wanted)


def test_pairing_tells_cells_apart_that_their_own_intervals_do_not():
    rng = np.random.default_rng(1)
    hard = rng.normal(50, 20, 60)  # what makes an item hard for every model
    better = {"documents": list(range(60)), "sizes": [10] * 60}
    worse = better | {"amounts": (hard + 2 + rng.normal(0, 1, 60)).tolist()}
    better = better | {"amounts": hard.tolist()}
    a, b = (
        ratio_interval(np.array(x["amounts"]), np.full(60, 10), np.arange(60))
        for x in (better, worse)
    )
    assert a[1] > b[0]
    error = paired_error(Paired(**worse), Paired(**better))
    assert error.freedom == 59
    # a difference of 0.2 bits per byte with a deviation of 0.1 over 60 documents
    assert error.deviation == pytest.approx(0.1 / math.sqrt(60), rel=0.2)
    assert paired_error(Paired(**worse), Paired(**better | {"sizes": [9] * 60})) is None


def test_the_error_over_seeds_against_the_textbook():
    assert seed_error([1.0, 2.0, 3.0]) == pytest.approx((1 / math.sqrt(3), 2))  # deviation 1
    values = [float(i % 3) for i in range(21)]  # variance 14/20
    assert seed_error(values) == pytest.approx((math.sqrt(0.7 / 21), 20))
    low, high = widened([2.0, 2.0], 2.0, seed_error([1.0, 2.0, 3.0]))  # t(2) = 4.303
    assert high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4) == 2 - low
    assert seed_error([1.0]) is None
    seeds = seed_error([1.0, 2.0, 3.0])
    found = documents_error(widened([1.8, 2.2], 2.0, seeds), 2.0, seeds)
    assert found.deviation == pytest.approx(0.2 / 1.96, rel=1e-4)
    assert documents_error([1.8, 2.2], 2.0, None) == pytest.approx(found)


def test_the_spread_of_runs_is_that_of_all_cells():
    # variances 1 and 2 of 3 and 2 values
    both = [[1.0, 2.0, 3.0], [4.0, 6.0]]
    assert run_error(both) == pytest.approx((math.sqrt((2 * 1 + 1 * 2) / 3), 3))
    assert run_error([*both, [7.0], []]) == run_error(both)
    assert run_error([[1.0], [2.0]]) is None
    # of six cells one has diverged: twice the median's variance, chi squared of 1 has 0.455
    six = [[0.0, math.sqrt(2.0)]] * 5 + [[0.0, 1e3]]
    assert run_error(six) == pytest.approx((math.sqrt(2 / 0.45494), 6), rel=1e-4)
    # most cells have one value at all seeds, as accuracies on few items have
    assert run_error([[0.5, 0.5]] * 3 + [[0.5, 0.5 + math.sqrt(2)]]).deviation == 0.5


def test_a_cells_own_spread_counts_where_it_is_wider():
    run, narrow, wide = Error(2.0, 9), [1.0, 1.1, 1.2], [0.0, 3.0, 6.0]
    found = difference_over_seeds([narrow, wide], run)
    assert found == pytest.approx((math.sqrt(4 / 3 + 9 / 3), 9))
    # one seed, and what is no run
    assert difference_over_seeds([[1.0], []], run) == (2.0, 9)
    assert difference_over_seeds([narrow, wide], None) is None


def test_p_values_and_their_correction_against_the_textbook():
    # t(3) = 3.182 is the 97.5% quantile
    assert p_value(3.1824, [Error(1.0, 3)]) == pytest.approx(0.05, rel=1e-3)
    # Banerjee 1960: at p, t(4) and t(10) give half-widths whose squares sum to that of the difference
    both = [Error(3.0, 4), Error(4.0, 10)]
    half = math.hypot(3 * stats.t.isf(0.01, 4), 4 * stats.t.isf(0.01, 10))
    assert p_value(half, both) == pytest.approx(0.02) == p_value(-half, both)
    assert p_value(half, [*both, Error(0.0, 1)]) == p_value(half, both)
    assert p_value(0.0, [Error(0.0, 5)]) == 1.0 and p_value(0.1, [Error(0.0, 5)]) == 0.0
    assert (
        p_value(1e-9, [Error(1.0, 3)]) == pytest.approx(1.0) and p_value(1e9, [Error(1, 80)]) == 0
    )
    # Holm 1979: .01 against .05/4, .02 fails at .05/3, and so does all that is larger
    assert holm([0.04, 0.01, 0.02, 0.03], 0.05) == [False, True, False, False]
    assert holm([0.013, 0.01, 0.02, 0.03], 0.05) == [True] * 4
