"""What the ranks tell each other after each step: the signals that they have heard, and the
checkpoints that they have written. All act on it at the same step."""

import signal
from collections import deque

from megaarch.distributed.mesh import AXES, Grid
from megaarch.training.steps_in_flight import Readback, upload


class Agreement:
    """behind: how many steps later the ranks act on what they said, so that none has to wait for the
    device. One process alone acts at once."""

    def __init__(self, grid: Grid, behind: int = 0):
        self.grid, self.behind = grid, behind
        self._said: deque[Readback] = deque()

    def reach(self, heard: int, ready: int) -> tuple[int, int]:
        """(the number of a signal that any rank heard, or 0; the sum of what they have ready), as all
        said `behind` calls ago, and (0, 0) before that. Every rank calls it.

        heard: the number of this rank's signal, or 0. ready: as `Saver.ready`.
        """
        if self.grid.mesh is None:
            return heard, ready
        said = [0.0] * signal.NSIG
        said[heard] = 1.0
        said[0] = float(ready)
        total = self.grid.sum(upload(said, self.grid.device), tuple(AXES))
        self._said.append(Readback(total))
        if len(self._said) <= self.behind:
            return 0, 0
        all_ready, *counts = self._said.popleft().read()
        return counts.index(max(counts)) + 1 if any(counts) else 0, int(all_ready)
