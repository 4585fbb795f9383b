"""How the SDPA kernel runs a batch's parts: which rectangles go into one call. Host only.

    parts --overlay--> tiles, rectangles of one batch row --batch--> calls

torch skips what lies above the diagonal only with `is_causal`, which is top-left. Where queries are the
last rows of their own key range (a prefix decoder), the rows before them are computed as well and thrown
away: the causal overlay. Rows whose parts differ only in the prefix then share one call, and no mask is
stored.

Tiles of one kind go into one call while padding them to the longest costs less than another
call. Identical tiles of all batch rows are slices of the tensors and copy nothing.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megaarch.attention.mask import CAUSAL, FULL, Parts, Tile, visible_tiles
from megaarch.attention.plan import CallPlan

CALL = 1 << 20  # what one more call costs, in (query, key) pairs of 4 heads of 64
Rows = tuple[slice, slice] | np.ndarray  # batch and row ranges, or flat rows [G, Q or K]


@dataclass(frozen=True)
class Call:
    """Tiles of one kind, run by one call. Shorter tiles are padded at the end by their last row.

    shape: of the tiles. square: causal with |q| = |k|, for which `is_causal` suffices.
    q_lengths, k_lengths: int64 [G]. q, k: the rows that it reads, on a device as tensors.
    kept: the rows of its result that are output; None: all. out: the rows of the output that these are.
    masks: made for it on a device so far, by dtype.
    """

    shape: int
    square: bool
    q_lengths: np.ndarray
    k_lengths: np.ndarray
    q: Any
    k: Any
    kept: Any
    out: Any
    masks: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def masked(self) -> bool:
        """True where the call needs a mask."""
        if self.shape == FULL:
            return bool((self.k_lengths < self.k_lengths.max()).any())
        return not self.square


def build(parts: Parts, call_pairs: int = CALL) -> CallPlan:
    """Returns the calls of a batch. call_pairs: what one more call costs."""
    visible = visible_tiles(parts)
    runs = batch(overlay(visible, parts), len(parts), call_pairs)
    calls = tuple(call_of(run, parts) for run in runs)
    filled = sum(tile.q for tile in visible) == len(parts) * parts.queries
    return CallPlan(calls, filled and len(calls) == 1 and isinstance(calls[0].out, tuple))


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


def batch(tiles: list[Tile], rows: int, call_pairs: int) -> list[list[Tile]]:
    """Returns tiles by call: first those that all batch rows share, then those of similar lengths."""
    same, rest, runs = defaultdict(list), defaultdict(list), []
    for tile in tiles:
        same[tile._replace(row=0, skip=0)].append(tile)
    for equal in same.values():
        if len(equal) == rows and rows * equal[0].q * equal[0].k >= call_pairs:
            runs.append(equal)
        else:
            rest[equal[0].kind].extend(equal)
    for alike in rest.values():
        alike.sort(key=lambda tile: (-tile.k, -tile.q, tile.row, tile.q_start))
        runs.extend(by_length(alike, call_pairs))
    return runs


def by_length(tiles: list[Tile], call_pairs: int) -> Iterator[list[Tile]]:
    """Yields runs of tiles, longest keys first, whose padding costs less than another call."""
    run, queries, useful = [], 0, 0
    for tile in tiles:
        wider, area = max(queries, tile.q), useful + tile.q * tile.k
        if run and (len(run) + 1) * wider * run[0].k - area > call_pairs:
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
    q, kept = _rows(row, q0, q1, parts.queries), None
    if isinstance(q, tuple) and (skip == skip[0]).all():
        first = int(skip[0])
        out = q[0], slice(int(q0[0]) + first, int(q1[0]))
        if first:
            kept = slice(None), slice(first, None)
    else:
        local = np.arange((q1 - q0).max())
        used = (local >= skip[:, None]) & (local < (q1 - q0)[:, None])
        out = (row * parts.queries + q0)[:, None] + local
        if not used.all():
            out, kept = out[used][None], np.flatnonzero(used)[None]
    shape, square = tiles[0].kind
    k = _rows(row, k0, k1, parts.keys)
    return Call(shape, square, q1 - q0, k1 - k0, q, k, kept, out)


def _rows(row: np.ndarray, start: np.ndarray, end: np.ndarray, stride: int) -> Rows:
    """Returns slices where the ranges are equal and the batch rows consecutive, else flat rows."""
    equal = (start == start[0]).all() and (end == end[0]).all()
    if equal and (np.diff(row) == 1).all():
        return slice(int(row[0]), int(row[-1]) + 1), slice(int(start[0]), int(end[0]))
    local = np.minimum(np.arange((end - start).max()), (end - start - 1)[:, None])
    return (row * stride + start)[:, None] + local
