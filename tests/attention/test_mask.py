"""The mask algebra: the dense mask, the area and the invariants, from the published definitions."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.attention.mask import CAUSAL, FULL, Parts, area, causal, full
from tests.attention.partitions import partitions


def sees(part, i, j):
    """R: i in q and j in k. C: and j <= i + (|k| - |q|), both counted inside the part."""
    shape, q0, q1, k0, k1 = part
    if not (q0 <= i < q1 and k0 <= j < k1):
        return False
    return shape == FULL or (j - k0) <= (i - q0) + (k1 - k0) - (q1 - q0)


@settings(max_examples=60)
@given(partitions())
def test_dense_is_the_definition_and_area_counts_it(case):
    rows, queries, keys = case
    parts = Parts.of(rows, queries, keys)
    defined = [
        [[any(sees(part, i, j) for part in row) for j in range(keys)] for i in range(queries)]
        for row in rows
    ]
    dense = parts.dense()
    assert dense.tolist() == defined
    assert parts.area() == dense.sum()
    assert parts.area() == sum(area(part) for row in rows for part in row)
    assert [parts.row(b) for b in range(len(parts))] == [list(row) for row in rows]


def test_the_three_shapes_of_the_drawing():
    drawn = Parts.of([[full(0, 2, 0, 3)], [causal(0, 3, 0, 3)], [causal(0, 2, 0, 4)]], 3, 4).dense()
    assert drawn.astype(int).tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
    ]


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([[full(0, 2, 0, 2)], [(3, 0, 1, 0, 1)]], ["batch row 1", "[3, 0, 1, 0, 1]", "shape"]),
        ([[(-1, 0, 1, 0, 1)]], ["batch row 0", "shape"]),
        ([[full(-1, 2, 0, 2)]], ["batch row 0", "queries outside 0:8"]),
        ([[full(0, 9, 0, 2)]], ["queries outside 0:8"]),
        ([[full(3, 3, 0, 2)]], ["queries outside"]),
        ([[full(0, 1, 0, 1), causal(4, 2, 0, 2)]], ["part 1", "queries outside"]),
        ([[full(0, 2, -1, 2)]], ["keys outside 0:6"]),
        ([[], [full(0, 2, 0, 7)]], ["batch row 1", "keys outside 0:6"]),
        ([[full(0, 2, 3, 2)]], ["keys outside"]),
        (
            [[], [causal(5, 8, 0, 6), full(0, 2, 0, 2), full(1, 4, 0, 2)]],
            ["batch row 1", "two parts", "[1, 0, 2, 0, 2]", "[1, 1, 4, 0, 2]"],
        ),
        ([[full(0, 8, 0, 2), full(3, 4, 0, 2), full(4, 5, 0, 2)]], ["two parts"]),
    ],
)
def test_a_broken_invariant_is_found_and_named(rows, names):
    with pytest.raises(ValueError) as fault:
        Parts.of(rows, queries=8, keys=6)
    for name in names:
        assert name in str(fault.value)


@settings(max_examples=60)
@given(partitions(rows=1), st.data())
def test_any_row_in_two_parts_is_found(case, data):
    (row,), queries, keys = case
    if not row:
        return
    _, q0, q1, _, _ = data.draw(st.sampled_from(row))
    again = data.draw(st.integers(q0, q1 - 1))
    extra = full(again, data.draw(st.integers(again + 1, queries)), 0, keys)
    rows = data.draw(st.permutations([*row, extra]))
    with pytest.raises(ValueError, match="two parts"):
        Parts.of([[], rows], queries, keys)


def test_wrong_table_shape():
    with pytest.raises(ValueError, match=r"\[B, P, 5\]"):
        Parts(np.zeros((2, 4), dtype=np.int32), 4, 4)


def test_no_parts_and_empty_keys_are_allowed():
    assert Parts.of([[], []], 4, 4).area() == 0
    empty = Parts.of([[full(0, 2, 3, 3), causal(2, 4, 0, 0)]], 4, 4)
    assert empty.area() == 0
    assert not empty.dense().any()


def test_a_plan_is_built_once_and_pickled_with_the_parts():
    parts = Parts.of([[causal(0, 4, 0, 4)]], 4, 4)
    built = []

    def build(p):
        built.append(p)
        return {"shape": CAUSAL}

    assert parts.plan("kernel", build) is parts.plan("kernel", build)
    copy = pickle.loads(pickle.dumps(parts))
    assert copy.plan("kernel", build) == {"shape": CAUSAL}
    assert len(built) == 1
    assert np.array_equal(copy.table, parts.table) and (copy.queries, copy.keys) == (4, 4)
    assert parts.plan("another", build) == {"shape": CAUSAL}
    assert len(built) == 2
