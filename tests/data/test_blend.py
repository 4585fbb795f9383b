"""Blending: exact shares at every scale, each task's samples once and in order, no state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch import config
from megaarch.data.blend import BLOCK, Blend


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(0, 2**32))
def test_every_task_gets_its_samples_once_in_order_and_its_share(weights, seed):
    blend = Blend(weights, seed)
    n = 2 * BLOCK
    drawn = [blend[i] for i in range(n)]
    for task, weight in enumerate(weights):
        mine = [place for t, place in drawn if t == task]
        assert mine == list(range(len(mine)))
        assert abs(len(mine) - n * weight / sum(weights)) <= 1.5


def test_a_sample_is_a_function_of_seed_and_index_alone():
    far = 10**9 + 7
    assert Blend([1, 2], 5)[far] == Blend([1, 2], 5)[far]
    few = [Blend([1, 2], 5)[i][0] for i in range(64)]
    assert few != [Blend([1, 2], 6)[i][0] for i in range(64)]
    assert 0 < np.mean(few) < 1


UL2 = [0.2, *[0.8 / 6] * 6]  # of two sources, one of 1%
SMALL = {
    "one": [0.9986, 0.0014],
    "one of many": [0.0014, *[0.1] * 9, 0.0986],
    "one in the middle": [0.5, 1e-4, 0.5],
    "some": [0.3, 3e-4, 2e-4, 0.3, 1e-3, 0.3984, 1e-4],
    "ul2": [part * share for part in UL2 for share in (0.99, 0.01)],
    "all": [1.0] * 700,
    "all but one": [1.0] * 700 + [1e6],
    "hardly any": [1, 1e-300, 1e-6, 5e-324],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_weight_too_small_for_a_block_is_met_over_many(name):
    weights = np.array(SMALL[name])
    blend, blocks = Blend(weights.tolist(), 3), 60
    drawn = [blend[i] for i in range(blocks * BLOCK)]
    tasks, places = map(np.array, zip(*drawn, strict=True))
    wanted = weights / weights.sum() * len(drawn)
    for task, expected in enumerate(wanted):
        mine = places[tasks == task]
        assert np.array_equal(mine, np.arange(len(mine)))
        assert abs(len(mine) - expected) <= 2 + np.log2(len(weights)) / 2


def test_blends_are_those_of_earlier_versions():
    """Samples depend on them: each edge of the cumulative shares is rounded, in every block."""
    for weights in ([3.0, 1.0], UL2, [0.5, 0.002, 0.3, 0.198], [1.0] * 512):
        edges = np.cumsum([0.0, *weights]) / np.sum(weights)
        blend = Blend(weights, 3)
        for block in (0, 1, 17, 10**6):
            tasks = [blend[i][0] for i in range(block * BLOCK, (block + 1) * BLOCK)]
            ends = [np.floor(edges * BLOCK * b + 0.5) for b in (block, block + 1)]
            wanted = np.diff(ends[1]) - np.diff(ends[0])
            assert np.array_equal(np.bincount(tasks, minlength=len(weights)), wanted)


@pytest.mark.parametrize("weight", [1e308, 1e-308, 5e-324, 1e13, 1.0])
def test_weights_of_any_size_are_shares(weight):
    n = 2 * BLOCK
    for weights, share in (([weight] * 4, 0.25), ([weight, weight / 2, weight / 2], 0.5)):
        if not all(weights):
            continue
        blend = Blend(weights, 3)
        drawn = np.bincount([blend[i][0] for i in range(n)], minlength=len(weights))
        assert abs(drawn[0] - n * share) <= 1.5
        assert (drawn > 0).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_none_are_one_sentence(bad):
    for weights in ([1.0, bad], [bad, bad], [bad]):
        with pytest.raises(ValueError, match="blend weights are finite and above zero, not"):
            Blend(weights, 0)


def source(weight):
    raw = {"data": {"source": [{"path": "a", "weight": weight}, {"path": "b"}]}}
    return config.resolve(raw).data.source[0]


@pytest.mark.parametrize("weight", [1e308, 1e19, 1e-19, 5e-324, 0.0, -1.0, float("nan"), 1e999])
def test_a_weight_out_of_bounds_is_refused_where_it_is_set(weight):
    with pytest.raises(config.ConfigError, match=r"data\.source.*weight"):
        source(weight)


def test_tokens_of_a_source_are_a_weight():
    assert source(1.5e13).weight == 1.5e13
