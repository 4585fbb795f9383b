"""Blending: exact shares at every scale, each task's samples once and in order, no state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.data.blend import BLOCK, Blend


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=6), st.integers(0, 2**32))
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
