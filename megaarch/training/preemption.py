"""Being told to stop: the step is finished, the run saved, and only then it ends.

SIGTERM and SIGUSR1 (what SLURM sends before a time limit or a preemption) end a run with the exit
code REQUEUE; they may come twice, for a launcher passes on what its ranks have got as well. SIGINT
(Ctrl-C) ends it with that of an interrupted command, and a second one at once.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType

REQUEUE = 75  # EX_TEMPFAIL: run the same command again and it continues
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.signal returns it


class Stopped(Exception):
    """A run that was told to stop, after it has been saved. number: of the signal. step: None for several
    runs at a time."""

    def __init__(self, number: int, step: int | None = None):
        super().__init__(number, step)
        self.number, self.step = number, step

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        step = "" if self.step is None else f" at step {self.step}"
        return f"stopped by {name} and saved{step}; the same command continues"


class Watch:
    """Listens for the signals while a run trains. Use as a context manager; `asked` is the number
    of the first signal that came, or 0. Outside the main thread it hears nothing."""

    def __init__(self):
        self.asked = 0
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if number == signal.SIGINT:  # a second one ends what runs at once
            signal.signal(number, self._before[signal.SIGINT])
