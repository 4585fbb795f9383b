"""Bins: every item in one row, no row over its limit, no room wasted that an item would have taken."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.data.bin_packing import pack_classes

LIMIT = np.array([20, 9])
CLASSES = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8
)


@settings(max_examples=100)
@given(CLASSES)
def test_every_item_stands_in_one_row_that_has_room_for_it(classes):
    sizes = np.array([size for *size, _ in classes])
    counts = np.array([count for *_, count in classes])
    rows = [p.items(row) for p in pack_classes(sizes, counts, LIMIT) for row in range(p.rows)]
    held = Counter((k, n) for row in rows for k, numbers in row for n in numbers)
    assert held == {(k, n): 1 for k, count in enumerate(counts) for n in range(count)}
    taken = np.array([sum(len(numbers) * sizes[k] for k, numbers in row) for row in rows])
    assert (taken <= LIMIT).all() and (taken > 0).any(axis=1).all()
    # first fit: what begins a row fits none of the others with what is larger than it
    assert sum((t + u <= LIMIT).all() for i, t in enumerate(taken) for u in taken[:i]) == 0


@settings(max_examples=100)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=300))
def test_rows_are_as_few_as_first_fit_decreasing_promises(lengths):
    sizes, counts = np.unique(lengths, return_counts=True)
    found = sum(p.rows for p in pack_classes(sizes[:, None], counts, np.array([100])))
    least = -(-sum(lengths) // 100)
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        i = next((i for i, room in enumerate(rooms) if room >= n), len(rooms))
        rooms[i:i] = [100] * (i == len(rooms))
        rooms[i] -= n
    assert least <= found <= len(rooms) * 1.1 + 1
