"""Who is better at which budget: planted laws that cross, do not, and are one."""

from dataclasses import replace

import numpy as np

from megaarch.scaling import display, law
from megaarch.scaling.crossing import compare, comparisons
from tests.scaling.planted import TRUTH, Documents, planted


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


def on_documents(seed, shift=0.02, **laws):
    """Fits of laws whose runs are all scored on the same documents, which favour each by `shift`."""
    held = Documents.drawn(seed)
    return [
        law.fit(planted(0.002, 2 * seed + k, truth, name, documents=held, shift=shift), 150, k)
        for k, (name, truth) in enumerate(laws.items())
    ]


def test_what_the_documents_favour_is_rarely_called_a_difference():
    """Run noise of 0.002 and documents' of 0.02: what is common to all points of a law is not in their residuals."""
    called = 0
    for seed in range(8):
        found = compare(*on_documents(seed, a=TRUTH, b=TRUTH))
        called += found.different
        assert found.documents
    assert called <= 1


def test_laws_are_compared_on_the_same_documents():
    """Better by 2%, on documents whose choice moves both by 5%."""
    better = replace(TRUTH, A=0.98 * TRUTH.A, B=0.98 * TRUTH.B, E=0.98 * TRUTH.E)
    first, second = on_documents(0, 0.002, worse=TRUTH, better=better)
    assert first.intervals()["E"][0] < second.intervals()["E"][1], "each alone tells nothing"
    assert compare(first, second).better == ("better", "better")


def test_a_draw_that_decides_no_law_is_left_out_of_both():
    whole, _ = on_documents(0, a=TRUTH, b=TRUTH)
    numbers = (getattr(whole.resamples, name)[5:] for name in law.NAMES)
    fewer = replace(whole, resamples=law.Law(*numbers), draws=whole.draws[5:])
    assert compare(whole, fewer).intervals == ((0.0, 0.0), (0.0, 0.0))


def test_few_documents_make_intervals_wide():
    wide, narrow = (
        np.diff(compare(*fits).intervals[0])
        for fits in (
            [replace(one, points=replace(one.points, sizes=np.ones(number))) for one in pair]
            for pair in [on_documents(0, a=TRUTH, b=TRUTH)]
            for number in (3, 36)
        )
    )
    assert wide > 3 * narrow


def test_budgets_that_do_not_overlap_are_not_compared():
    small, large = planted(0.01), planted(0.01)
    large = replace(large, tokens=large.tokens * 1e6, name="large")
    assert comparisons({p.name: law.fit(p, 20) for p in (small, large)}) == []


def test_a_sentence_for_an_end_that_cannot_be_told():
    found = compare(*fits(0.002, worse=replace(TRUTH, E=1.9), better=TRUTH).values())
    at_high = replace(found, intervals=((-0.1, 0.1), (0.05, 0.1)))
    assert display.sentence(at_high).startswith(f"better is better at {found.budgets[1]:.3g} FLOPs")
    assert display.sentence(at_high).endswith(f"at {found.budgets[0]:.3g} it cannot be told.")
