"""Intervals, standard errors and p values, against textbooks."""

import math

import numpy as np
import pytest
from scipy import stats

from megaarch.evaluation.confidence_intervals import (
    Error,
    holm,
    p_value,
    paired_error,
    ratio_interval,
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
    assert seed_error([[1.0, 2.0, 3.0]]) == pytest.approx((1 / math.sqrt(3), 2))  # deviation 1
    values = [float(i % 3) for i in range(21)]  # variance 14/20
    assert seed_error([values]) == pytest.approx((math.sqrt(0.7 / 21), 20))
    low, high = widened([2.0, 2.0], 2.0, seed_error([[1.0, 2.0, 3.0]]))  # t(2) = 4.303
    assert high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4) == 2 - low
    # two samples, pooled: variances 1 and 2 of 3 and 2 values, t(3) = 3.182
    pooled = math.sqrt((2 * 1 + 1 * 2) / 3 * (1 / 3 + 1 / 2))
    assert seed_error([[1.0, 2.0, 3.0], [4.0, 6.0]]) == pytest.approx((pooled, 3))
    assert seed_error([[1.0], [2.0]]) is None


def test_p_values_and_their_correction_against_the_textbook():
    # t(3) = 3.182 is the 97.5% quantile; of two errors Welch's degrees of freedom
    assert p_value(3.1824, [Error(1.0, 3)]) == pytest.approx(0.05, rel=1e-3)
    both = [Error(3.0, 4), Error(4.0, 10)]
    freedom = 25**2 / (81 / 4 + 256 / 10)
    assert p_value(10.0, both) == pytest.approx(2 * stats.t.sf(2.0, freedom))
    assert p_value(0.0, [Error(0.0, 5)]) == 1.0 and p_value(0.1, [Error(0.0, 5)]) == 0.0
    # Holm 1979: .01 against .05/4, .02 fails at .05/3, and so does all that is larger
    assert holm([0.04, 0.01, 0.02, 0.03], 0.05) == [False, True, False, False]
    assert holm([0.013, 0.01, 0.02, 0.03], 0.05) == [True] * 4
