"""The mask algebra: an attention mask is a partition of the query rows into parts.

A part is one of two shapes over contiguous ranges of query rows q and key columns k:

    FULL    R[q; k]   every query of q sees every key of k
    CAUSAL  C[q; k]   query i sees key j iff j <= i + (|k| - |q|), i and j counted inside the part

       R[0:2; 0:3]      C[0:3; 0:3]      C[0:2; 0:4]   (bottom-right)
       x x x            x . .            x x x .
       x x x            x x .            x x x x
                        x x x

Invariant: each query row belongs to at most one part. So no log-sum-exp merge is ever needed:
outputs of parts are rows of one tensor, dQ concatenates, dK and dV add. A row in no part is
padding, and gives exactly zero, forward and backward; so does a row whose part shows it no key.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from megaarch.attention.plan import pinned

UNUSED, FULL, CAUSAL = 0, 1, 2
COLUMNS = 5  # shape, query start, query end, key start, key end


def full(q_start: int, q_end: int, k_start: int, k_end: int) -> tuple[int, ...]:
    """R[q_start:q_end; k_start:k_end]."""
    return (FULL, q_start, q_end, k_start, k_end)


def causal(q_start: int, q_end: int, k_start: int, k_end: int) -> tuple[int, ...]:
    """C[q_start:q_end; k_start:k_end], aligned at the bottom right."""
    return (CAUSAL, q_start, q_end, k_start, k_end)


def area(part: Iterable[int]) -> int:
    """Number of (query, key) pairs that one part lets see each other. Exact."""
    shape, q_start, q_end, k_start, k_end = (int(x) for x in part)
    q, k = q_end - q_start, k_end - k_start
    if shape == FULL:
        return q * k
    if shape == CAUSAL:
        if k >= q:
            return q * (k - q) + q * (q + 1) // 2
        return k * (k + 1) // 2  # the first q - k rows see nothing
    return 0


@dataclass(frozen=True)
class Parts:
    """The parts of every row of a batch, on the host.

    table: int32 [B, P, 5], columns (shape, q_start, q_end, k_start, k_end); shape UNUSED (all
        zero) fills the rows of the table that a batch row does not need.
    queries, keys: lengths of the query and key axes that the ranges index.
    full_row: queries and keys of a full row. Less than the axes where these are padded so that they
        divide among ranks; None: the axes.
    handle: int64 [1], what stands for these parts in this process where only tensors may pass.

    Construction checks the invariants and raises ValueError with the batch row at fault.
    """

    table: np.ndarray
    queries: int
    keys: int
    full_row: tuple[int, int] | None = None
    handle: torch.Tensor = field(init=False, repr=False, compare=False)
    _plans: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        table = np.asarray(self.table)
        if table.ndim != 3 or table.shape[2] != COLUMNS:
            raise ValueError(f"parts must have shape [B, P, {COLUMNS}], not {list(table.shape)}")
        object.__setattr__(self, "table", np.ascontiguousarray(table, dtype=np.int32))
        fault = find_fault(self.table, self.queries, self.keys)
        if fault:
            raise ValueError(fault)
        self._enter()

    def _enter(self) -> None:
        number = next(_numbers)
        object.__setattr__(self, "handle", torch.tensor([number]))
        _known[number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._enter()

    @classmethod
    def of(
        cls,
        rows: Iterable[Iterable[tuple[int, ...]]],
        queries: int,
        keys: int,
        *,
        room: int | None = None,
        full_row: tuple[int, int] | None = None,
    ) -> "Parts":
        """From one list of parts for each batch row. room: P; None: as many as the longest list has.
        ValueError for a list with more."""
        rows = [list(row) for row in rows]
        if room is None:
            room = max(map(len, rows), default=0)
        table = np.zeros((len(rows), room, COLUMNS), dtype=np.int32)
        for b, row in enumerate(rows):
            if len(row) > room:
                raise ValueError(f"row {b} has {len(row)} parts and room for {room}")
            if row:
                table[b, : len(row)] = row
        return cls(table, queries, keys, full_row)

    def __len__(self) -> int:
        return self.table.shape[0]

    def row(self, b: int) -> list[tuple[int, ...]]:
        """The parts in use in batch row b."""
        return [tuple(int(x) for x in part) for part in self.table[b] if part[0] != UNUSED]

    def plan(self, kernel: str, build: Callable[["Parts"], Any]) -> Any:
        """Returns what `kernel` derives from these parts: `build(self)`, once, then remembered.

        Every layer shares it, and it is pickled with the parts, so that a loader's worker can
        build it before the step.
        """
        if kernel not in self._plans:
            self._plans[kernel] = build(self)
        return self._plans[kernel]

    def pin_memory(self) -> None:
        """Puts the plans made so far into pinned memory."""
        for kernel, found in self._plans.items():
            self._plans[kernel] = pinned(found)

    def area(self) -> int:
        """Number of visible (query, key) pairs in the whole batch. Exact."""
        return sum(area(part) for part in self.table[self.table[:, :, 0] != UNUSED])

    def dense(self) -> np.ndarray:
        """bool [B, queries, keys]: True where a query sees a key. For oracles and drawings."""
        seen = np.zeros((len(self), self.queries, self.keys), dtype=bool)
        for b in range(len(self)):
            for shape, q0, q1, k0, k1 in self.row(b):
                block = np.ones((q1 - q0, k1 - k0), dtype=bool)
                if shape == CAUSAL:
                    block = np.tril(block, k=(k1 - k0) - (q1 - q0))
                seen[b, q0:q1, k0:k1] = block
        return seen


class Tile(NamedTuple):
    """A rectangle of one batch row. Its first `skip` query rows are computed for nothing."""

    shape: int
    row: int
    q_start: int
    q_end: int
    k_start: int
    k_end: int
    skip: int = 0

    @property
    def q(self) -> int:
        return self.q_end - self.q_start

    @property
    def k(self) -> int:
        return self.k_end - self.k_start

    @property
    def kind(self) -> tuple[int, bool]:
        return self.shape, self.shape == CAUSAL and self.q == self.k


def visible_tiles(parts: Parts) -> list[Tile]:
    """Returns one tile a part, without the rows that see no key."""
    tiles = []
    for row, index in np.argwhere(parts.table[:, :, 0]).tolist():
        shape, q0, q1, k0, k1 = parts.table[row, index].tolist()
        if shape == CAUSAL:
            q0 = max(q0, q1 - (k1 - k0))
        if k1 > k0:
            # A last row alone sees all keys.
            tiles.append(Tile(FULL if q1 - q0 == 1 else shape, row, q0, q1, k0, k1))
    return tiles


_numbers = itertools.count()
_known: WeakValueDictionary[int, Parts] = WeakValueDictionary()


def by_handle(handle: torch.Tensor) -> Parts:
    """The parts of this process whose `handle` this is."""
    return _known[int(handle.item())]


def find_fault(table: np.ndarray, queries: int, keys: int) -> str | None:
    """The first broken invariant of a [B, P, 5] table as a sentence, or None."""
    shape, q0, q1, k0, k1 = table.transpose(2, 0, 1)
    used = shape != UNUSED
    checks = (
        ((shape < UNUSED) | (shape > CAUSAL), "has a shape that is neither FULL nor CAUSAL"),
        (used & ((q0 < 0) | (q1 <= q0) | (q1 > queries)), f"has queries outside 0:{queries}"),
        (used & ((k0 < 0) | (k1 < k0) | (k1 > keys)), f"has keys outside 0:{keys}"),
    )
    for wrong, what in checks:
        if wrong.any():
            b, p = np.argwhere(wrong)[0]
            return f"part {p} of batch row {b} {table[b, p].tolist()} {what}"
    # Rows in at most one part: sorted by start, no range begins before the one before it ends.
    start = np.where(used, q0, np.iinfo(np.int32).max)
    order = np.argsort(start, axis=1, kind="stable")
    start = np.take_along_axis(start, order, axis=1)
    end = np.take_along_axis(np.where(used, q1, np.iinfo(np.int32).max), order, axis=1)
    overlap = start[:, 1:] < end[:, :-1]
    if overlap.any():
        b, p = np.argwhere(overlap)[0]
        return (
            f"batch row {b} has a query row in two parts: {table[b, order[b, p]].tolist()} "
            f"and {table[b, order[b, p + 1]].tolist()}"
        )
    return None
