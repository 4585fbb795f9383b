"""Parabolas at each budget and the power law of their lowest points."""

import numpy as np
import pytest

from megaarch.scaling.isoflop import budgets, isoflop
from megaarch.scaling.points import Run, of

BUDGETS = (1e18, 4e18, 1.6e19)


def best(flops):
    return 2e8 * (flops / 1e18) ** 0.48


def runs(noise=0.0, seeds=1, away=1.0, draw=0):
    rng = np.random.default_rng(draw)
    rows = []
    for flops in BUDGETS:
        for size in best(flops) * away * np.geomspace(0.3, 3, 5):
            loss = 3 - 0.1 * np.log10(flops / 1e18) + 0.05 * np.log(size / best(flops)) ** 2
            rows += [
                (size, flops / 6 / size, loss + noise * rng.standard_normal()) for _ in range(seeds)
            ]
    return of("runs", [Run(*row) for row in rows])


def test_planted_parabolas_give_their_lowest_points_back():
    found = isoflop(runs())
    assert [v.flops for v in found.valleys] == pytest.approx(BUDGETS)
    assert [v.parameters for v in found.valleys] == pytest.approx([best(c) for c in BUDGETS])
    assert [v.loss for v in found.valleys] == pytest.approx(
        [3 - 0.1 * np.log10(c / 1e18) for c in BUDGETS]
    )
    assert all(v.inside and v.curvature == pytest.approx(0.05) for v in found.valleys)
    assert found.exponent == pytest.approx(0.48)


def test_the_interval_of_the_exponent_holds_it_and_grows_with_noise():
    found = [isoflop(runs(0.003, 3, draw=k), 100).interval for k in range(20)]
    assert sum(low < 0.48 < high for low, high in found) >= 17
    narrow, wide = (np.diff(isoflop(runs(noise, 3), 100).interval) for noise in (0.001, 0.01))
    assert wide > 5 * narrow


def test_a_lowest_point_beyond_the_sizes_is_none():
    found = isoflop(runs(away=10.0))
    assert not any(v.inside for v in found.valleys)
    assert found.exponent is None and found.interval is None


def test_two_sizes_make_no_parabola():
    assert isoflop(of("two", [Run(1e8, 1e9, 3.0), Run(2e8, 5e8, 2.9)])) is None


def test_budgets_that_differ_by_rounding_are_one():
    places = budgets(of("p", [Run(1e8, 1.01e9, 3), Run(1e8, 4e9, 2), Run(2e8, 0.5e9, 3)]))
    assert [sorted(p.tolist()) for p in places] == [[0, 2], [1]]


def test_a_budget_whose_losses_have_no_lowest_point_has_none():
    rows = [
        Run(size, 1e15 / 6 / size, loss) for size, loss in ((1e6, 3.0), (2e6, 3.1), (4e6, 2.95))
    ]
    [valley] = isoflop(of("runs", rows)).valleys
    assert (valley.parameters, valley.loss, valley.inside) == (None, None, False)


def test_dense_budgets_do_not_chain():
    flops = 1e18 * 1.04 ** np.arange(20)
    found = budgets(of("runs", [Run(2e8, f / 6 / 2e8, 3.0) for f in flops]))
    assert [len(places) for places in found] == [2] * 10
