"""Heartbeats: a rank that dies or hangs ends its job within a bounded time, and is named.

A thread of each rank beats: every `interval` it writes its state to a store that rank 0 serves. Rank 0 reads
all beats, the others rank 0's and its verdict. So dying and hanging are told apart: a rank that is dead or
stopped falls silent (`training.heartbeat_timeout`), while one that is in a step for too long still beats
(`training.hang_timeout`; a process's first step, which may compile, and everything outside steps may take any
time, and so may a step that waits for that of another rank). Time is counted in turns of a thread's own loop,
so a job that was suspended and resumed as a whole has missed nothing.

The verdict is one sentence on stderr, and every rank ends with the exit code LOST, from the thread:
the main one may sit in a collective that never returns.
"""

import json
import math
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch import distributed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # is public

from megaarch.config.schema import Training
from megaarch.distributed.mesh import Grid
from megaarch.errors import in_brief

LOST = 69  # EX_UNAVAILABLE: a rank died or hung; the same command continues from its checkpoint
INTERVAL = 2.0  # seconds between two beats, at most
LAST_INTERVAL = 0.05  # the same while ranks end
SUSPECT = 5  # silent turns after which a rank counts as lost, once another has lost its connection
NAMED = 4  # locations that the sentence about a hang names at most
AGAIN = "run the same command again and it continues from its newest checkpoint"
ENDED = "ended"  # the verdict where every rank has raised an error of its own


@dataclass
class Beat:
    """A rank's state, as it writes it.

    last: the step that ended last. held: seconds that its step has taken so far, 0 outside of a step whose
    time is bounded. longest: of those that have ended. location: function and line of its main thread. state:
    "runs", "failed" or "gone".
    """

    count: int
    host: str
    last: int | None
    held: float
    longest: float
    location: str
    state: str
    error: str


class Heartbeat:
    """A context manager that watches over the ranks of `grid`. One process alone watches nobody."""

    def __init__(self, grid: Grid, training: Training):
        self.grid, timeout = grid, training.heartbeat_timeout
        self.on = grid.mesh is not None and timeout > 0
        self.rank = distributed.get_rank() if self.on else 0
        self.interval = min(INTERVAL, timeout / 10) if timeout else INTERVAL
        self.patience = math.ceil(timeout / self.interval)  # silent turns
        self.hang_timeout, self.longest = training.hang_timeout, 0.0
        self.turns = 0  # of `_watch`: this module's clock
        self.last: int | None = None  # step that ended last
        self.entered: int | None = None  # turn in which a step began whose time is bounded
        self.state, self.error = "runs", ""
        self.beats: dict[int, Beat] = {}
        self.verdict = ""
        self.over, self.hurry = threading.Event(), threading.Event()

    def __enter__(self) -> "Heartbeat":
        if self.on:
            main = self.rank == 0
            address = os.environ.get("MASTER_ADDR", "localhost")  # launch.join sets it
            within = timedelta(seconds=max(self.patience * self.interval, 10.0))
            if main:
                self.store = TCPStore(address, 0, is_master=True, timeout=within)
                self.store.set("verdict", "")
            port = self.grid.share(self.store.port if main else 0)
            if not main:
                self.store = TCPStore(address, port, timeout=within)
            self._write()
            self.grid.barrier()
            self._read()
            for loop in (self._beat, self._watch):
                threading.Thread(target=loop, daemon=True, name=loop.__name__).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Ranks without an error end together. One with an error waits until all are known to have
        theirs (it is then no rank's fault), or which rank caused it."""
        if not self.on:
            return
        if isinstance(error, Exception):
            self._fail(error)
        elif error is None:
            try:
                self.grid.barrier()
            except RuntimeError as lost:
                self._fail(lost)
                raise
        self.over.set()
        self.hurry.set()

    def _fail(self, error: Exception) -> None:
        self.error = in_brief(error)
        self.state = "failed"
        self.hurry.set()
        while not self.over.wait(INTERVAL):  # in turns, so that signals are handled
            pass

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps training step `number`, from its batch on."""
        began = self.turns
        self.entered = None if self.last is None else began
        yield
        if self.entered is not None:
            self.longest = max(self.longest, (self.turns - began) * self.interval)
        self.last, self.entered = number, None

    def _write(self) -> None:
        before = self.beats.get(self.rank)
        beat = Beat(
            count=1 if before is None else before.count + 1,
            host=socket.gethostname(),
            last=self.last,
            held=0.0 if self.entered is None else (self.turns - self.entered) * self.interval,
            longest=self.longest,
            location=_location(),
            state=self.state,
            error=self.error,
        )
        self.beats[self.rank] = beat
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def _read(self) -> None:
        ranks = range(self.grid.world_size) if self.rank == 0 else [0]
        verdict, *beats = self.store.multi_get(["verdict", *(f"beat/{rank}" for rank in ranks)])
        self.beats |= {rank: Beat(**json.loads(beat)) for rank, beat in zip(ranks, beats)}
        self.verdict = verdict.decode()

    def _beat(self) -> None:
        """Beats and reads. Where the store is gone, rank 0 is, and falls silent for `_watch`."""
        try:
            while not self.over.is_set():
                self._write()
                self._read()
                ending = [beat.state != "runs" for beat in self.beats.values()]
                if self.rank == 0 and all(ending) and not self.verdict:
                    self._publish(ENDED)
                if self.verdict == ENDED and self._leave():
                    return
                if any(ending):
                    time.sleep(min(LAST_INTERVAL, self.interval))
                else:
                    self.hurry.wait(self.interval)
        except RuntimeError:  # of torch's stores
            return

    def _leave(self) -> bool:
        """Lets each rank raise the error that it has. Rank 0 serves the store, and goes last."""
        self.state = "gone"
        if self.rank == 0 and any(beat.state != "gone" for beat in self.beats.values()):
            return False
        self._write()
        self.over.set()
        return True

    def _watch(self) -> None:
        """Counts the turns in which each rank was silent, or had failed, until there is a verdict."""
        watched = [rank for rank in self.beats if rank != self.rank]
        silent, failed = dict.fromkeys(watched, 0), dict.fromkeys(self.beats, 0)
        counts = dict.fromkeys(watched, 0)
        while not self.over.wait(self.interval):
            self.turns += 1
            for rank in watched:
                count = self.beats[rank].count
                silent[rank] = silent[rank] + 1 if count == counts[rank] else 0
                counts[rank] = count
            for rank, beat in self.beats.items():
                failed[rank] += beat.state != "runs"
            if self.verdict and self.verdict != ENDED:
                self._end(self.verdict, printed=True)
            elif sentence := self._lost(silent, failed) or self._failed(failed) or self._hung():
                self._end(sentence, printed=False)

    def _lost(self, silent: dict[int, int], failed: dict[int, int]) -> str:
        patience = min(SUSPECT, self.patience) if any(failed.values()) else self.patience
        gone = [r for r, n in silent.items() if n >= patience and self.beats[r].state != "gone"]
        if not gone:
            return ""
        return (
            f"{self._describe(gone)} gave no sign of life for "
            f"{silent[gone[0]] * self.interval:.3g} s: it died or was stopped; {AGAIN}"
        )

    def _failed(self, failed: dict[int, int]) -> str:
        """An error is a rank's own where, by now, a silent rank would have been noticed."""
        rank = max(failed, key=lambda rank: failed[rank])
        if self.rank != 0 or failed[rank] < SUSPECT + 3 or all(failed.values()):
            return ""
        return f"{self._describe([rank])} failed and the others wait: {self.beats[rank].error}"

    def _hung(self) -> str:
        if self.rank != 0 or not self.hang_timeout:
            return ""
        last = min(beat.last or 0 for beat in self.beats.values())
        behind = {rank: beat for rank, beat in self.beats.items() if (beat.last or 0) == last}
        # one that came late has held the others up, and has neither their time nor their longest step
        held = min(beat.held for beat in behind.values())
        longest = min(beat.longest for beat in self.beats.values())
        if held <= max(self.hang_timeout, 3 * longest):
            return ""
        at = defaultdict(list)
        for rank, beat in behind.items():
            at[beat.location].append(rank)
        # the odd one out first: most ranks wait for it at one location
        rarest = sorted(at.items(), key=lambda item: len(item[1]))[:NAMED]
        where = "; ".join(f"{self._describe(ranks)} is in {place}" for place, ranks in rarest)
        setting = "training.hang_timeout"
        return f"step {last + 1} has not ended for {held:.3g} s ({setting}): {where}; {AGAIN}"

    def _describe(self, ranks: list[int]) -> str:
        beat = self.beats[ranks[0]]
        # ranks step together, and this one may know of a step that the other did not live to report
        last = max((step for step in (self.last, beat.last) if step is not None), default=None)
        after = "before its first step" if last is None else f"last step {last}"
        more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        return f"rank {ranks[0]} on {beat.host}{more} ({after})"

    def _publish(self, verdict: str) -> None:
        self.verdict = verdict
        self.store.set("verdict", verdict)

    def _end(self, sentence: str, printed: bool) -> None:
        """Ends this rank. One that failed raises its own error instead, if the sentence names it."""
        own = sentence.startswith(f"rank {self.rank} ")
        first_here = self.rank == 1 or os.environ.get("LOCAL_RANK") == "0"
        if not printed and (self.rank == 0 or first_here):
            print(f"megaarch: {sentence}", file=sys.stderr, flush=True)
        if self.rank == 0:
            self._publish(sentence)
            time.sleep(3 * self.interval)  # the others are to read it from the store served here
        if own and self.state == "failed":
            self.over.set()
        else:
            os._exit(LOST)


def _location() -> str:
    """Returns the function and line that the main thread is in."""
    main = threading.main_thread().ident
    assert main is not None
    frame = sys._current_frames()[main]
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
