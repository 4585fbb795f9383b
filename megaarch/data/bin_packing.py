"""Bins: which items share a row, where many items are of one size.

First-fit decreasing over classes of equal items, not over items, so that the time follows from the
number of sizes and not from that of the items (Krell et al. 2021, arXiv:2107.02027, pack histograms of
lengths likewise).

    limit 10, 5 items of 4 and 4 of 3     2 rows of  4 4      1 row of  4 3 3      1 row of  3 3
"""

from dataclasses import dataclass

import numpy as np

Content = tuple[int, int, int]


@dataclass(frozen=True)
class Pattern:
    """Rows that hold the same number of items of each class.

    rows: how many. contents: (class, items of it in each row, number of the first of them within its
    class): the items of the first row come first.
    """

    rows: int
    contents: tuple[Content, ...] = ()

    def items(self, row: int) -> list[tuple[int, range]]:
        """Returns (class, numbers of its items) of one of the rows."""
        return [
            (k, range(first + row * times, first + (row + 1) * times))
            for k, times, first in self.contents
        ]

    def rest(self, start: int, stop: int) -> "Pattern":
        """Returns rows `start` to `stop` of these."""
        moved = tuple((k, times, first + start * times) for k, times, first in self.contents)
        return Pattern(stop - start, moved)


Filled = tuple[Pattern, np.ndarray]  # rows, and what is left in each of them, int [D]


def pack_classes(sizes: np.ndarray, counts: np.ndarray, limit: np.ndarray) -> list[Pattern]:
    """Returns rows that hold every item once, each where it fits first.

    sizes: int [K, D] of an item of each class, each within `limit` [D] and not all zero.
    counts: int [K], items of each class.
    """
    assert (sizes <= limit).all() and (sizes > 0).any(axis=1).all()
    share = (sizes / np.maximum(limit, 1)).max(axis=1)
    patterns: list[Pattern] = []
    room = np.zeros((0, len(limit)), dtype=np.int64)  # what is left in a row of each pattern
    for k in np.argsort(-share, kind="stable").tolist():
        size, number, count = sizes[k], 0, int(counts[k])
        made: list[Filled] = []
        for p in np.flatnonzero((room >= size).all(axis=1)).tolist():
            if number == count:
                break
            (filled, *others), placed = _fill(patterns[p], room[p], k, size, number, count)
            patterns[p], room[p] = filled
            made += others
            number += placed
        if number < count:
            rows = Pattern(-(-(count - number) // _times(limit, size)))
            made += _fill(rows, limit, k, size, number, count)[0]
        if made:
            patterns += [pattern for pattern, _ in made]
            room = np.concatenate([room, [left for _, left in made]])
    return patterns


def _fill(
    pattern: Pattern, room: np.ndarray, k: int, size: np.ndarray, number: int, count: int
) -> tuple[list[Filled], int]:
    """Puts items `number` to `count` of class k into the rows of a pattern, as many in each as fit. Returns
    what these become, and how many items they took: rows that get fewer, and those that get none, are
    patterns of their own."""
    times = _times(room, size)
    full, last = divmod(min(count - number, pattern.rows * times), times)
    end = full + bool(last)
    made = []
    for start, stop, each in ((0, full, times), (full, end, last), (end, pattern.rows, 0)):
        held = pattern.rest(start, stop)
        if each:
            held = Pattern(held.rows, (*held.contents, (k, each, number + start * times)))
        if held.rows:
            made.append((held, room - each * size))
    return made, full * times + last


def _times(room: np.ndarray, size: np.ndarray) -> int:
    used = size > 0
    return int((room[used] // size[used]).min())
