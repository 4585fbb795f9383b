"""Blending: exact shares at every scale, each task's samples once and in order, no state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch import config
from megaarch.data.blend import BLOCK, Blend


@settings(max_examples=30, deadline=None)
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


def test_a_weight_that_cannot_be_met_is_an_error():
    with pytest.raises(ValueError, match="give every source at least"):
        Blend([1, 1e-6], 0)


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
