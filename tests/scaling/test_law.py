"""The parametric law against points of a paper, an optimizer of another kind, and planted laws."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from megaarch.errors import UserError
from megaarch.scaling import law, points
from tests.scaling.planted import TRUTH, planted

# 245 runs of Hoffmann et al. 2022, figure 4, as Besiroglu et al. 2024 read them off (epoch-research/
# analyzing-chinchilla); they leave out the five of the fewest tokens a parameter
CHINCHILLA = Path(__file__).with_name("chinchilla_points.csv")
PUBLISHED = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
WITHIN = {"A": 0.02, "B": 0.04, "E": 0.001, "alpha": 0.005, "beta": 0.005}


@pytest.fixture(scope="module")
def chinchilla():
    [found] = points.read(CHINCHILLA).values()
    return law.fit(found.without_lowest_ratios(5), resamples=300)


def test_it_equals_the_published_fit_of_chinchillas_points(chinchilla):
    assert len(chinchilla.points) == 240
    for name, wanted in PUBLISHED.items():
        assert getattr(chinchilla.law, name) == pytest.approx(wanted, rel=WITHIN[name]), name
        low, high = chinchilla.intervals()[name]
        assert low < wanted < high, name


def test_no_other_optimizer_finds_a_lower_sum_of_huber_losses(chinchilla):
    found = chinchilla.points

    def huber(theta):
        a, b, e, alpha, beta = theta
        model = np.exp(e) + np.exp(a) / found.parameters**alpha + np.exp(b) / found.tokens**beta
        r = np.abs(np.log(model) - np.log(found.loss))
        return np.sum(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)))

    at = chinchilla.law
    ours = huber([np.log(at.A), np.log(at.B), np.log(at.E), at.alpha, at.beta])
    assert ours == pytest.approx(chinchilla.huber, rel=1e-9)
    options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-9, "fatol": 1e-14}
    for start in ([6, 7, 0.5, 0.35, 0.35], [8, 9, 0.7, 0.45, 0.45], [4, 5, 0.3, 0.25, 0.25]):
        other = minimize(huber, start, method="Nelder-Mead", options=options)
        assert ours <= other.fun * (1 + 1e-9)
    assert other.fun == pytest.approx(ours, rel=0.01), "and one of them comes near"


def test_points_without_noise_give_their_law_back():
    found = law.fit(planted(noise=0.0), resamples=2).law
    for name in law.NAMES:
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-5), name


def test_intervals_hold_the_planted_law():
    """25 draws; 500 are python -m tests.scaling.simulate."""
    hits = dict.fromkeys(law.NAMES, 0)
    for seed in range(25):
        fit = law.fit(planted(noise=0.01, seed=seed), resamples=150, seed=seed)
        for name, (low, high) in fit.intervals().items():
            hits[name] += low <= getattr(TRUTH, name) <= high
    assert all(number >= 22 for number in hits.values()), hits
    assert any(number < 25 for number in hits.values()), "they are not as wide as one likes"


def test_the_best_allocation_is_the_lowest_loss_of_its_budget():
    budget = 3e20
    parameters, tokens = TRUTH.allocation(budget)
    assert 6 * parameters * tokens == pytest.approx(budget)
    sizes = parameters * np.geomspace(0.5, 2, 101)
    losses = TRUTH.loss(sizes, budget / 6 / sizes)
    assert losses.argmin() == 50 and losses.min() == pytest.approx(TRUTH.best_loss(budget))


def test_what_decides_no_law_is_refused():
    few = planted(noise=0.01)
    with pytest.raises(UserError, match="5 points do not decide the five parameters"):
        law.fit(few.without_lowest_ratios(len(few) - 5))
    one = points.of("one size", [points.Run(1e8, 1e9 * k, 3 / k) for k in range(1, 9)])
    with pytest.raises(UserError, match="one or two numbers of parameters"):
        law.fit(one)


@pytest.mark.parametrize(
    "sizes, tokens_of, sentence",
    [
        ((1e8, 3e8, 1e9), lambda n: [1.6e19 / n], "9 points at 3 pairs of parameters and tokens"),
        (np.geomspace(1e8, 4e9, 7), lambda n: [1.6e19 / n], "tokens follow from parameters"),
        (np.geomspace(1e8, 4e9, 7), lambda n: [20 * n], "tokens follow from parameters"),
        (np.geomspace(1e8, 4e9, 7), lambda n: [5e9, 2e10], "one or two numbers of tokens"),
    ],
    ids=["sizes", "budget", "ladder", "tokens"],
)
def test_seeds_are_no_points_of_their_own(sizes, tokens_of, sentence):
    """Which differ in tokens and losses by little: of one budget, of 20 tokens a parameter, of two numbers of
    tokens."""
    rng = np.random.default_rng(0)
    rows = [
        (n, d * np.exp(0.005 * rng.normal()), TRUTH.loss(n, d) * np.exp(0.003 * rng.normal()))
        for n in sizes
        for d in tokens_of(n)
        for _ in range(3)
    ]
    with pytest.raises(UserError, match=sentence):
        law.fit(points.of("p", [points.Run(*row) for row in rows]), resamples=50)


def test_losses_that_depend_on_neither_decide_no_exponent():
    of = planted(noise=0.0)
    flat = points.Points(
        "flat", of.parameters, of.tokens, np.random.default_rng(0).uniform(2, 3, 42)
    )
    with pytest.raises(UserError, match="flat: 42 points do not decide the exponents"):
        law.fit(flat, resamples=50)
