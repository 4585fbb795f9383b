"""Blending by weight, without state: which task a sample comes from, and its place there.

Samples come in blocks. In a block every task has its exact share (rounded so that the total over
blocks never drifts by more than one), in an order drawn from (seed, block). So sample i is found
from seed and i alone, and proportions hold at every scale. Tasks below 2 samples in a block share
what the others leave, halves of them by halves: in some blocks they have none.
"""

from functools import lru_cache

import numpy as np

from megaarch.data.example import generator
from megaarch.errors import UserError

BLOCK = 1024
UNIT = 1 << 60  # shares of small tasks are whole multiples of 1 / UNIT, so that no rounding drifts


class Blend:
    """Weights of tasks, e.g. datasets of a mixture or the denoisers of UL2.

    weights: finite and above zero, of any sum. share: float64 [tasks], their shares, which sum to 1.
    UserError for weights that are not.
    """

    def __init__(self, weights: list[float], seed: int):
        share = np.asarray(weights, dtype=np.float64)
        if not (np.isfinite(share) & (share > 0)).all():
            raise UserError(f"blend weights are finite and above zero, not {weights}")
        share = share / share.max()  # no sum of them can overflow
        self.share = share = share / share.sum()
        few = share * BLOCK < 2
        self._many, self._few = np.flatnonzero(~few), np.flatnonzero(few)
        self._edges = np.concatenate([[0.0], np.cumsum(share[self._many])])[:-1]
        self._units = [max(1, int(part * UNIT)) for part in share[self._few].tolist()]
        self.seed = seed
        self._order = lru_cache(maxsize=16)(self._draw_order)

    def _before(self, block: int) -> np.ndarray:
        """Returns the number of samples of each task in all blocks before `block`."""
        total = BLOCK * block
        few = total if not len(self._many) else _part(total, sum(self._units), UNIT)
        counts = np.zeros(len(self.share), dtype=np.int64)
        starts = np.floor(self._edges * total + 0.5).astype(np.int64)
        counts[self._many] = np.diff(starts, append=total - few)
        counts[self._few] = _divided(few, self._units)
        return counts

    def _draw_order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the task of each sample of a block, and its index among that task's samples."""
        before = self._before(block)
        quota = self._before(block + 1) - before
        tasks = np.repeat(np.arange(len(quota)), quota)
        generator(self.seed ^ 0xB1E4D, block).shuffle(tasks)
        index = np.empty(BLOCK, dtype=np.int64)
        first = before - (np.cumsum(quota) - quota)
        index[np.argsort(tasks, kind="stable")] = np.repeat(first, quota) + np.arange(BLOCK)
        return tasks, index

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Returns sample i's task, and its index among that task's samples."""
        if len(self.share) == 1:
            return 0, i
        block, place = divmod(i, BLOCK)
        tasks, index = self._order(block)
        return int(tasks[place]), int(index[place])


def _part(total: int, part: int, whole: int) -> int:
    """Returns total·part/whole, rounded: it never falls, nor grows by more than the total does."""
    return (2 * total * part + whole) // (2 * whole)


def _divided(total: int, units: list[int]) -> list[int]:
    """Returns `total` divided among tasks of these shares, of which none ever falls as it grows."""
    if len(units) < 2:
        return [total] * len(units)
    half = len(units) // 2
    left, right = units[:half], units[half:]
    first = _part(total, sum(left), sum(units))
    return _divided(first, left) + _divided(total - first, right)
