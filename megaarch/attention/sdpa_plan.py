"""How the SDPA kernel runs a batch's parts: which rectangles go into one call. Host only.

    parts --cut, overlay--> tiles, rectangles of one batch row --batch--> calls

Cutting depends on what the device's kernel does with a mask:

    cpu    computes every rectangle it is given, masked or not, in blocks of up to 512 keys. So a
           long causal part is cut into bands of query rows whose key ranges grow.

           C[0:4; 0:4]      x . | . .        two bands, C[0:2; 0:2] and C[2:4; 0:4]
                            x x | . .
                            ----+
                            x x x .
                            x x x x

    other  skips what lies above the diagonal, but only with `is_causal`, which is top-left. Where
           queries are the last rows of their own key range (a prefix decoder), the rows before
           them are computed as well and thrown away: the causal overlay. Rows whose parts differ
           only in the prefix then share one call, and no mask is stored.

Tiles of one kind go into one call while padding them to the longest costs less than another
call. Identical tiles of all batch rows are slices of the tensors and copy nothing. Where the rows
are so short that even so the whole batch under one dense mask costs less (cpu only), that is the
plan.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaarch.attention.mask import CAUSAL, FULL, UNUSED, Parts, Tile, visible_tiles
from megaarch.attention.plan import CallPlan


@dataclass(frozen=True)
class Costs:
    """The time of a device's kernel, in (query, key) pairs of 4 heads of 64, forward and backward.

    call: one more call. row: one more query or key row, handed in and taken out.
    band: query rows of a band, for a kernel that does not profit from `is_causal`; None: overlay.
    """

    call: int
    row: int
    band: int | None

    @classmethod
    def of(cls, device_type: str) -> "Costs":
        return CPU if device_type == "cpu" else ACCELERATOR


CPU = Costs(call=1 << 12, row=20, band=192)  # the kernel's blocks are slower below 192 rows
ACCELERATOR = Costs(call=1 << 20, row=0, band=None)

Rows = tuple[slice, slice] | np.ndarray  # batch and row ranges, or flat rows [G, Q or K]


@dataclass(frozen=True)
class Call:
    """Tiles of one kind, run by one call. Shorter tiles are padded at the end by their last row.

    shape: of the tiles; UNUSED is the whole batch under its dense mask.
    square: causal with |q| = |k|, for which `is_causal` suffices.
    q_lengths, k_lengths: int64 [G]. q, k: the rows that it reads.
    target: the rows that its result goes to, as gather.IndexGather has it.
    """

    shape: int
    square: bool
    q_lengths: np.ndarray
    k_lengths: np.ndarray
    q: Rows
    k: Rows
    target: tuple[Any, Any]

    @property
    def masked(self) -> bool:
        """True where the call needs a mask."""
        if self.shape == FULL:
            return bool((self.k_lengths < self.k_lengths.max()).any())
        return not self.square


def build(parts: Parts, costs: Costs) -> CallPlan:
    """Returns the calls of a batch on a device with these costs."""
    visible = visible_tiles(parts)
    tiles = overlay(visible, parts) if costs.band is None else cut(visible, costs.band)
    runs = batch(tiles, len(parts), costs)
    filled = sum(tile.q for tile in visible) == len(parts) * parts.queries
    dense = costs.call + len(parts) * parts.queries * parts.keys
    if not filled:  # around padding, all rows are gathered
        dense += 2 * costs.row * len(parts) * (parts.queries + parts.keys)
    if costs.band and len(runs) > 1 and sum(cost(run, costs) for run in runs) > dense:
        calls = (dense_call(visible, parts),)
    else:
        calls = tuple(call_of(run, parts) for run in runs)
    whole = filled and len(calls) == 1 and isinstance(calls[0].target[0], tuple)
    return CallPlan(calls, whole, filled)


def cost(run: list[Tile], costs: Costs) -> int:
    """Returns the cost of one call of these tiles, padded to the longest; gathered rows count twice."""
    q, k = max(tile.q for tile in run), max(tile.k for tile in run)
    same = all(tile[2:] == run[0][2:] for tile in run)
    return costs.call + len(run) * (q * k + costs.row * (q + k) * (1 if same else 2))


def cut(tiles: list[Tile], band: int) -> list[Tile]:
    """Causal tiles of two bands or more become one tile a band."""
    bands = []
    for tile in tiles:
        if tile.shape == FULL or tile.q < 2 * band:
            bands.append(tile)
            continue
        edges = [*range(tile.q_start, tile.q_end - band + 1, band), tile.q_end]
        for start, end in itertools.pairwise(edges):
            bands.append(
                tile._replace(q_start=start, q_end=end, k_end=tile.k_end - (tile.q_end - end))
            )
    return bands


def overlay(tiles: list[Tile], parts: Parts) -> list[Tile]:
    """Causal tiles at the end of their own key range become squares over all of that range.

    Only where every row of the square is a row of some part: a padding row may hold NaN, which
    would reach the gradients of the keys.
    """
    in_part = np.zeros((len(parts), parts.queries), dtype=bool)
    for tile in tiles:
        in_part[tile.row, tile.q_start : tile.q_end] = True
    return [
        tile._replace(q_start=tile.k_start, skip=tile.k - tile.q)
        if tile.shape == CAUSAL
        and tile.q_end == tile.k_end
        and in_part[tile.row, tile.k_start : tile.q_start].all()
        else tile
        for tile in tiles
    ]


def batch(tiles: list[Tile], rows: int, costs: Costs) -> list[list[Tile]]:
    """Returns tiles by call: first those that all batch rows share, then those of similar lengths."""
    same, rest, runs = defaultdict(list), defaultdict(list), []
    for tile in tiles:
        same[tile._replace(row=0, skip=0)].append(tile)
    for equal in same.values():
        if len(equal) == rows and rows * equal[0].q * equal[0].k >= costs.call:
            runs.append(equal)
        else:
            rest[equal[0].kind].extend(equal)
    for alike in rest.values():
        alike.sort(key=lambda tile: (-tile.k, -tile.q, tile.row, tile.q_start))
        runs.extend(by_length(alike, costs))
    return runs


def by_length(tiles: list[Tile], costs: Costs) -> Iterator[list[Tile]]:
    """Yields runs of tiles, longest keys first, whose padding costs less than another call.

    A tile so large that gathering it costs more than a call stays alone, a slice.
    """
    run, queries, useful = [], 0, 0
    for tile in tiles:
        wider, area = max(queries, tile.q), useful + tile.q * tile.k
        alone = costs.row * (tile.q + tile.k) > costs.call
        if run and (alone or (len(run) + 1) * wider * run[0].k - area > costs.call):
            yield run
            run, wider, area = [], tile.q, tile.q * tile.k
        run.append(tile)
        queries, useful = wider, area
    if run:
        yield run


def call_of(tiles: list[Tile], parts: Parts) -> Call:
    """Returns the call that runs these tiles, which are of one kind."""
    tiles = sorted(tiles, key=lambda tile: tile.row)
    row, q0, q1, k0, k1, skip = np.array([tile[1:] for tile in tiles], dtype=np.int64).T
    q = _rows(row, q0, q1, parts.queries)
    if isinstance(q, tuple) and (skip == skip[0]).all():
        target = (q[0], slice(int(q0[0] + skip[0]), int(q1[0]))), int(skip[0])
    else:
        local = np.arange((q1 - q0).max())
        kept = (local >= skip[:, None]) & (local < (q1 - q0)[:, None])
        to = (row * parts.queries + q0)[:, None] + local
        target = to[kept], None if kept.all() else np.flatnonzero(kept)
    shape, square = tiles[0].kind
    return Call(shape, square, q1 - q0, k1 - k0, q, _rows(row, k0, k1, parts.keys), target)


def dense_call(tiles: list[Tile], parts: Parts) -> Call:
    """Returns one call of the whole batch. Rows in no tile are replaced by a row of one, unread."""
    asks = np.zeros((len(parts), parts.queries), dtype=bool)
    seen = np.zeros((len(parts), parts.keys), dtype=bool)
    for tile in tiles:
        asks[tile.row, tile.q_start : tile.q_end] = True
        seen[tile.row, tile.k_start : tile.k_end] = True

    def rows(used: np.ndarray) -> Rows:
        if used.all():
            return slice(0, len(used)), slice(0, used.shape[1])
        index = np.arange(used.size).reshape(used.shape)
        return np.where(used, index, index[used][0])

    to = np.flatnonzero(asks)
    target = ((slice(0, len(asks)), slice(0, parts.queries)), 0) if asks.all() else (to, to)
    q, k = (np.full(len(parts), length) for length in (parts.queries, parts.keys))
    return Call(UNUSED, False, q, k, rows(asks), rows(seen), target)


def _rows(row: np.ndarray, start: np.ndarray, end: np.ndarray, stride: int) -> Rows:
    """Returns slices where the ranges are equal and the batch rows consecutive, else flat rows."""
    equal = (start == start[0]).all() and (end == end[0]).all()
    if equal and (np.diff(row) == 1).all():
        return slice(int(row[0]), int(row[-1]) + 1), slice(int(start[0]), int(end[0]))
    local = np.minimum(np.arange((end - start).max()), (end - start - 1)[:, None])
    return (row * stride + start)[:, None] + local
