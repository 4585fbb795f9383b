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


class Bins:
    """Rows under way. patterns: of all rows; `room` [len(patterns), D]: what is left in a row."""

    def __init__(self, limit: np.ndarray):
        self.limit = limit
        self.patterns: list[Pattern] = []
        self._room = np.zeros((64, len(limit)), dtype=np.int64)

    @property
    def room(self) -> np.ndarray:
        return self._room[: len(self.patterns)]

    def put(self, k: int, size: np.ndarray, count: int) -> None:
        """Puts `count` items of class k, each of `size` [D], where they fit first."""
        number = 0
        for p in np.flatnonzero((self.room >= size).all(axis=1)).tolist():
            if number == count:
                return
            number += self._fill(p, k, size, number, count - number)
        if number < count:
            each = _times(self.limit, size)
            self._add(Pattern(-(-(count - number) // each)), self.limit)
            self._fill(len(self.patterns) - 1, k, size, number, count - number)

    def _fill(self, p: int, k: int, size: np.ndarray, number: int, count: int) -> int:
        """Puts up to `count` items into the rows of pattern p, as many in each as fit; returns how
        many. Rows that get fewer, and those that get none, become patterns of their own."""
        pattern, room = self.patterns[p], self._room[p].copy()
        times = _times(room, size)
        full, last = divmod(min(count, pattern.rows * times), times)
        parts = [
            (0, full, times),
            (full, full + bool(last), last),
            (full + bool(last), pattern.rows, 0),
        ]
        place = p
        for start, stop, each in parts:
            if start == stop:
                continue
            held = pattern.rest(start, stop)
            if each:
                first = number + start * times
                held = Pattern(held.rows, (*held.contents, (k, each, first)))
            if place is None:
                self._add(held, room - each * size)
            else:
                self.patterns[place], self._room[place] = held, room - each * size
                place = None
        return full * times + last

    def _add(self, pattern: Pattern, room: np.ndarray) -> None:
        if len(self.patterns) == len(self._room):
            self._room = np.concatenate([self._room, np.zeros_like(self._room)])
        self._room[len(self.patterns)] = room
        self.patterns.append(pattern)


def _times(room: np.ndarray, size: np.ndarray) -> int:
    used = size > 0
    return int((room[used] // size[used]).min())


def pack_classes(sizes: np.ndarray, counts: np.ndarray, limit: np.ndarray) -> list[Pattern]:
    """Returns rows that hold every item once.

    sizes: int [K, D] of an item of each class, each within `limit` [D] and not all zero.
    counts: int [K], items of each class.
    """
    assert (sizes <= limit).all() and (sizes > 0).any(axis=1).all()
    bins = Bins(limit)
    share = (sizes / np.maximum(limit, 1)).max(axis=1)
    for k in np.argsort(-share, kind="stable").tolist():
        bins.put(k, sizes[k], int(counts[k]))
    return bins.patterns
