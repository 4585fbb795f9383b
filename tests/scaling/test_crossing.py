"""Who is better at which budget: planted laws that cross, do not, and are one."""

from dataclasses import replace

from megaarch.scaling import display, law
from megaarch.scaling.crossing import compare, comparisons
from tests.scaling.planted import TRUTH, planted


def fits(noise, resamples=200, **laws):
    return {
        name: law.fit(planted(noise, seed, truth, name), resamples, seed)
        for seed, (name, truth) in enumerate(laws.items())
    }


def root(first, second, low, high):
    """Where the losses of two laws at their best sizes meet, by bisection."""
    for _ in range(200):
        middle = (low * high) ** 0.5
        same = (first.best_loss(middle) < second.best_loss(middle)) == (
            first.best_loss(low) < second.best_loss(low)
        )
        low, high = (middle, high) if same else (low, middle)
    return low


def test_a_crossing_is_found_with_its_interval():
    late = replace(TRUTH, E=1.6, A=900.0)
    found = compare(*fits(0.002, early=TRUTH, late=late).values())
    wanted = root(TRUTH, late, *found.budgets)
    assert found.better == ("early", "late")
    low, high = found.crossing_interval
    assert low < wanted < high and low < found.crossing < high
    text = display.sentence(found)
    assert text.startswith("early is better up to") and text.endswith("and late from there on.")


def test_one_that_is_better_throughout_is_named():
    found = compare(*fits(0.002, worse=replace(TRUTH, E=1.9), better=TRUTH).values())
    assert found.better == ("better", "better") and found.crossing is None
    assert "better is better at" in display.sentence(found)


def test_two_equal_laws_are_rarely_called_different():
    """12 draws; 500 are python -m tests.scaling.simulate."""
    called = 0
    for seed in range(12):
        pair = [
            law.fit(planted(0.01, 2 * seed + k, TRUTH, name), 150, seed)
            for k, name in enumerate("ab")
        ]
        called += compare(*pair).different
    assert called <= 1
    assert "cannot be told apart" in display.sentence(compare(pair[0], pair[0]))


def test_budgets_that_do_not_overlap_are_not_compared():
    small, large = planted(0.01), planted(0.01)
    large = replace(large, tokens=large.tokens * 1e6, name="large")
    assert comparisons({p.name: law.fit(p, 20) for p in (small, large)}) == []


def test_a_sentence_for_an_end_that_cannot_be_told():
    found = compare(*fits(0.002, worse=replace(TRUTH, E=1.9), better=TRUTH).values())
    at_high = replace(found, intervals=((-0.1, 0.1), (0.05, 0.1)))
    assert display.sentence(at_high).startswith(f"better is better at {found.budgets[1]:.3g} FLOPs")
    assert display.sentence(at_high).endswith(f"at {found.budgets[0]:.3g} it cannot be told.")
