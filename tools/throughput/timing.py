"""Times that alternate: every round runs each candidate once, so that a noisy neighbour, a warming
chip or a falling clock hits all of them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

# Written between timings: no inputs wait in a GPU's cache, and the host, which goes on meanwhile, has
# launched a candidate's first kernels before its time begins.
FLUSH_BYTES = 1 << 31


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate, one figure a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def record(self) -> dict[str, float | int]:
        return quartiles(self.seconds)


def quartiles(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and quartiles in milliseconds."""
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    names = ("median_ms", "lower_quartile_ms", "upper_quartile_ms")
    figures = {n: round(1e3 * x, 6) for n, x in zip(names, (middle, low, high), strict=True)}
    return figures | {"repetitions": len(seconds)}


class Clock:
    """Marks moments on a device. On CUDA they are events: `intervals` waits for the device once.

    flush: on CUDA, whether `start` empties the cache.
    """

    def __init__(self, device: torch.device, flush: bool = True):
        self.cuda = device.type == "cuda"
        self.moments: list = []
        self.waste = None
        if self.cuda and flush:
            self.waste = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def start(self) -> None:
        """Forgets earlier moments and marks one."""
        self.moments = []
        if self.waste is not None:
            self.waste.zero_()
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between one moment and the next."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def alternate(
    candidates: Sequence[Callable[[Clock], None]],
    device: torch.device,
    repetitions: int,
    warm_up: int = 2,
) -> list[list[Times]]:
    """Times of each candidate's stages: a candidate starts the clock and marks each stage's end."""
    clock = Clock(device)

    def timed(candidate: Callable[[Clock], None]) -> list[float]:
        candidate(clock)
        return clock.intervals()

    return rounds([partial(timed, candidate) for candidate in candidates], repetitions, warm_up)


def rounds(
    candidates: Sequence[Callable[[], list[float]]], repetitions: int, warm_up: int = 2
) -> list[list[Times]]:
    """As `alternate`, of candidates that tell their stages' seconds themselves."""
    found: list[list[list[float]]] = [[] for _ in candidates]
    for round_ in range(warm_up + repetitions):
        for seconds, candidate in zip(found, candidates, strict=True):
            stages = candidate()
            if round_ >= warm_up:
                seconds.append(stages)
    return [[Times(tuple(s)) for s in zip(*seconds, strict=True)] for seconds in found]
