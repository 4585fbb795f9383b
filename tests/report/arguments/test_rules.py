"""Each argument's rule gives each of its three answers to data that call for it."""

import pytest

from megaarch.report.arguments import rules
from megaarch.report.arguments.rules import FAILS, HOLDS, UNKNOWN
from megaarch.report.yardsticks import Score


def score(value: float, half: float = 0.01) -> Score:
    """A value of three seeds, known to within `half`."""
    seeds = [value - half / 3, value, value + half / 3]
    return Score(value, [value - half, value + half], None, seeds)


def scores(**values: float) -> dict[str, Score]:
    return {name: score(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ({"gpt": 0.60, "prefix": 0.50, "t5": 0.40}, HOLDS),
        ({"gpt": 0.50, "prefix": 0.60, "t5": 0.40}, FAILS),
        ({"gpt": 0.60, "prefix": 0.601, "t5": 0.40}, UNKNOWN),
        ({"gpt": 0.30, "prefix": 0.255, "t5": 0.25}, HOLDS),
        ({"gpt": 0.251, "prefix": 0.20, "t5": 0.20}, UNKNOWN),  # none is above guessing
    ],
)
def test_generalization(raw, answer):
    found = rules.generalization(scores(**raw), "gpt", chance=0.25)
    assert found.answer == answer
    assert found.found.startswith("gpt is right in")


@pytest.mark.parametrize(
    ("others", "swapped", "answer"),
    [
        ({"bert": 0.3, "prefix": 0.4}, {"gpt": 0.1}, HOLDS),
        ({"bert": 0.3, "prefix": 0.6}, {"gpt": 0.1}, FAILS),
        ({"bert": 0.3, "prefix": 0.5}, {"gpt": 0.1}, UNKNOWN),
        ({"bert": 0.3}, {"gpt": 0.0}, UNKNOWN),  # the mask by itself costs nothing
        ({"bert": 0.3}, {"gpt": -0.1}, FAILS),
    ],
)
def test_rank(others, swapped, answer):
    pairs = {name: (score(0.5), score(value)) for name, value in others.items()}
    found = rules.rank(pairs, scores(**swapped))
    assert found.answer == answer


@pytest.mark.parametrize(
    ("nats", "states", "answer"),
    [
        ({"gpt": 3.0, "bert": 2.0}, {"gpt": 0.6, "bert": 0.5}, HOLDS),
        ({"gpt": 3.0, "bert": 2.0}, {"gpt": 0.5, "bert": 0.6}, FAILS),
        ({"gpt": 2.0, "bert": 3.0}, {"gpt": 0.6, "bert": 0.5}, FAILS),
        ({"gpt": 3.0, "bert": 2.0}, {"gpt": 0.5, "bert": 0.5}, UNKNOWN),
    ],
)
def test_difficulty(nats, states, answer):
    assert rules.difficulty(scores(**nats), scores(**states), "gpt").answer == answer


@pytest.mark.parametrize(
    ("others", "answer"),
    [
        ({"prefix": 1.0, "encdec": 1.2}, HOLDS),
        ({"prefix": 0.2, "encdec": 1.2}, FAILS),
        ({"prefix": 0.5, "encdec": 1.2}, UNKNOWN),
    ],
)
def test_in_context(others, answer):
    assert rules.in_context(score(0.5), scores(**others)).answer == answer


@pytest.mark.parametrize(
    ("causal", "blind", "cost", "answer"),
    [
        (0.1, 1.0, {"gpt": 0.1, "prefix": 0.3}, HOLDS),
        (0.7, 1.0, {"gpt": 0.1, "prefix": 0.3}, FAILS),  # the place is not read off
        (0.1, 1.0, {"gpt": 0.3, "prefix": 0.1}, FAILS),
        (0.1, 0.5, {"gpt": 0.1, "prefix": 0.3}, UNKNOWN),  # read off a bidirectional one as well
        (0.1, 1.0, {"gpt": 0.1, "prefix": 0.1}, UNKNOWN),
    ],
)
def test_position(causal, blind, cost, answer):
    bidirectional = {"bert": score(blind)}
    found = rules.position(score(causal), bidirectional, scores(**cost), "gpt")
    assert found.answer == answer


def test_what_is_hardly_measured_tells_no_place():
    cost = scores(gpt=0.1, prefix=0.3)
    wide = Score(0.6, [0.2, 1.05])
    for causal, bidirectional in (
        (score(0.1), {"bert": wide}),
        (score(0.1), {"bert": Score(None)}),
        (score(0.1), {}),
        (Score(0.1), {"bert": score(1.0)}),
        (Score(0.9), {"bert": score(1.0)}),
    ):
        assert rules.position(causal, bidirectional, cost, "gpt").answer == UNKNOWN


@pytest.mark.parametrize(
    ("flops", "answer"),
    [
        ({"gpt": 1.0, "prefix": 3.0, "t5": 1.5}, HOLDS),
        ({"gpt": 1.0, "prefix": 3.0, "t5": 0.9}, FAILS),
        ({"gpt": 1.0, "prefix": 3.0, "t5": 1.05}, UNKNOWN),
        ({"gpt": 1.0}, UNKNOWN),
    ],
)
def test_caches(flops, answer):
    assert rules.caches(flops, "gpt").answer == answer


@pytest.mark.parametrize(
    ("ours", "others", "answer"),
    [
        ({"cpu": 0.95}, {"dense": 0.5, "flex": 0.7}, HOLDS),
        ({"cpu": 0.95}, {"dense": 0.95, "flex": 0.97}, FAILS),
        ({"cpu": 0.95}, {"dense": 0.95, "flex": 0.7}, UNKNOWN),
        ({"cpu": 0.6}, {"dense": 0.5}, UNKNOWN),  # the mask itself may be what costs
        ({"cpu": 0.95}, {}, UNKNOWN),
    ],
)
def test_tools(ours, others, answer):
    assert rules.tools(ours, others).answer == answer


def test_a_score_without_a_value_decides_nothing():
    found = rules.in_context(score(0.5), {"prefix": Score(None), "encdec": score(0.9)})
    assert found.answer == UNKNOWN
    assert "not measured against prefix" in found.found
