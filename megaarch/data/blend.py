"""Blending by weight, without state: which task a sample comes from, and its place there.

Samples come in blocks. In a block every task has its exact share (rounded so that the total over
blocks never drifts by more than one), in an order drawn from (seed, block). So sample i is found
from seed and i alone, and proportions hold at every scale.
"""

from functools import lru_cache

import numpy as np

from megaarch.data.example import generator
from megaarch.errors import UserError

BLOCK = 1024


class Blend:
    """Weights of tasks, e.g. datasets of a mixture or the denoisers of UL2.

    weights: finite and above zero, of any sum. UserError where they are not, or where one is too
    small to be met (below 2 samples in a block of 1024).
    """

    def __init__(self, weights: list[float], seed: int):
        share = np.asarray(weights, dtype=np.float64)
        if not (np.isfinite(share) & (share > 0)).all():
            raise UserError(f"blend weights are finite and above zero, not {weights}")
        share = share / share.max()  # no sum of them can overflow
        share = share / share.sum()
        if len(share) > 1 and share.min() * BLOCK < 2:
            raise UserError(
                f"a blend weight of {weights[int(share.argmin())]} is {share.min():.4%} of the "
                f"total: give every source at least {2 / BLOCK:.2%}"
            )
        self.cumulative = np.concatenate([[0.0], np.cumsum(share)])
        self.cumulative[-1] = 1.0
        self.seed = seed
        self._order = lru_cache(maxsize=16)(self._draw_order)

    def _before(self, block: int) -> np.ndarray:
        """Returns the number of samples of each task in all blocks before `block`."""
        return np.diff(np.floor(self.cumulative * (BLOCK * block) + 0.5).astype(np.int64))

    def _draw_order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        quota = self._before(block + 1) - self._before(block)
        tasks = np.repeat(np.arange(len(quota)), quota)
        generator(self.seed ^ 0xB1E4D, block).shuffle(tasks)
        ranks = np.zeros(BLOCK, dtype=np.int64)
        for task in range(len(quota)):
            mine = tasks == task
            ranks[mine] = np.arange(mine.sum())
        return tasks, ranks

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Returns sample i's task, and its index among that task's samples."""
        if len(self.cumulative) == 2:
            return 0, i
        block, place = divmod(i, BLOCK)
        tasks, ranks = self._order(block)
        task = int(tasks[place])
        return task, int(self._before(block)[task] + ranks[place])
