"""The loader: the micro-batches of step s, as a pure function of the settings and s.

It holds no state: a run resumes from one integer. Workers make steps before the trainer asks for
them.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader

from megaarch.attention import warm
from megaarch.data.batch import Batch
from megaarch.data.dataset import Rows
from megaarch.data.packing import pack

WORKERS = {"cuda": 4}  # by device, where settings name no number
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(eq=False, kw_only=True)
class Steps(torch.utils.data.Dataset):
    """`steps[s]` is the list of micro-batches of step s for one data-parallel rank.

    global_batch_size, micro_batch_size: rows. rows_a_step: of the mean step, where that is less than
    global_batch_size; the rows that a step does not need are empty. rank, ranks: place among the
    data-parallel ranks; a step's rows are dealt out in contiguous shares. multiple: of which streams' lengths
    are stored (what that adds is no padding that counts). device_type, kernel: where batches will run and the
    attention kernel that `model.attention` names; its plans are made here, before the step, with what
    `fused_rows` needs. half: whether layers compute in half precision. bias: whether self-attention has a
    position bias. shard: from a batch to what the rank's model takes of it.
    """

    rows: Rows = field(kw_only=False)
    global_batch_size: int
    micro_batch_size: int
    rows_a_step: Fraction | None = None
    rank: int = 0
    ranks: int = 1
    multiple: int = 1
    device_type: str = "cpu"
    kernel: str = "auto"
    fused_rows: bool = False
    half: bool = True
    bias: bool = False
    shard: Callable[[Batch], Batch] = lambda batch: batch

    def __post_init__(self):
        assert self.global_batch_size % (self.micro_batch_size * self.ranks) == 0

    def samples(self, step: int) -> range:
        """Returns the samples of a step, on all ranks."""
        each = Fraction(self.global_batch_size) if self.rows_a_step is None else self.rows_a_step
        return range(*(math.floor(s * each + Fraction(1, 2)) for s in (step, step + 1)))

    def __getitem__(self, step: int) -> list[Batch]:
        samples = self.samples(step)
        count = self.global_batch_size // self.micro_batch_size  # on all ranks
        edges = [len(samples) * i // count for i in range(count + 1)]
        own = range(self.rank * count // self.ranks, (self.rank + 1) * count // self.ranks)
        return [self.batch(samples[edges[i] : edges[i + 1]], self.micro_batch_size) for i in own]

    def batch(self, samples: range, size: int | None = None) -> Batch:
        """Returns the Batch of these samples. size: its rows, the last of them empty; None: as many."""
        sample_index = range(samples.start, samples.start + (size or len(samples)))
        batch = pack(
            [self.rows[i] if i in samples else [] for i in sample_index],
            self.rows.shape,
            pad=self.rows.vocabulary.pad,
            axes=self.rows.axes,
            sample_index=sample_index,
            multiple=self.multiple,
        )
        for stream in batch.streams:
            for parts, bias in ((stream.parts, self.bias), (stream.cross, False)):
                if parts is not None:
                    how = (self.device_type, self.kernel, self.fused_rows)
                    warm(parts, *how, half=self.half, bias=bias)
        return self.shard(batch)


@contextmanager
def prefetch(steps: Steps, start: int, workers: int | None) -> Iterator[Iterator[list[Batch]]]:
    """Yields the micro-batches of steps start, start + 1, ... without end; made before their turn in
    `workers` processes (0: in this one; None: WORKERS of the device), which end with the block, or when this
    process has died. For CUDA they lie in pinned memory, so that the step's copy does not wait.

    They never get a signal that stops a run: it reaches a whole group of processes where a launcher
    sends it, and the trainer needs its batches to finish the step. The death of one is an error of
    the step that is asked for next, and of no line between.
    """
    device = steps.device_type
    workers = WORKERS.get(device, 0) if workers is None else workers
    # what is blocked in a process is so in those that it forks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    of_children = signal.getsignal(signal.SIGCHLD)
    try:
        batches: Any = iter(  # what ends the workers of torch's iterator is private
            DataLoader(
                steps,
                batch_size=None,
                sampler=count(start),
                num_workers=workers,
                pin_memory=device == "cuda",
                prefetch_factor=4 if workers else None,
                multiprocessing_context="fork" if workers else None,
            )
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # torch's handler raises wherever the process is: within a save, or where Python drops it
    handles = threading.current_thread() is threading.main_thread() and of_children is not None
    if workers and handles:
        signal.signal(signal.SIGCHLD, of_children)
    try:
        yield _received(batches, handles) if workers else batches
    finally:
        if workers:  # not at the interpreter's end: that sends SIGTERM and waits for them
            batches._shutdown_workers()
            for worker in batches._workers:  # one that hangs in a read
                worker.kill()
                worker.join()


def _received(batches: Any, handles: bool) -> Iterator[list[Batch]]:
    """Yields what workers send. handles: whether to hear of a death while it waits; a worker that is killed while
    it sends leaves a part of a message, for whose rest the process waits without end."""

    def check(*_: object) -> None:
        for worker in batches._workers:
            if worker.exitcode:
                raise RuntimeError(f"DataLoader worker (pid {worker.pid}) exited unexpectedly")

    while True:
        before = signal.signal(signal.SIGCHLD, check) if handles else None
        try:
            check()
            step = next(batches)
        except (OSError, EOFError):
            time.sleep(0.1)  # a connection is gone before its process is
            check()
            raise
        finally:
            if handles:
                signal.signal(signal.SIGCHLD, before)
        yield step
