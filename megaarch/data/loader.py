"""The loader: the micro-batches of step s, as a pure function of the settings and s.

It holds no state: a run resumes from one integer. Workers make steps before the trainer asks for
them.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader

from megaarch.attention import warm
from megaarch.data.batch import Batch
from megaarch.data.packing import pack
from megaarch.data.rows import Rows

WORKERS = {"cuda": 4}  # by device, where settings name no number
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(eq=False, kw_only=True)
class Steps(torch.utils.data.Dataset):
    """`steps[s]` is the list of micro-batches of step s for one data-parallel rank.

    global_batch_size, micro_batch_size: rows. rank, ranks: place among the data-parallel ranks;
    a step's rows are dealt out in contiguous shares. multiple: of which streams' lengths are stored
    (what that adds is no padding that counts). device_type, kernel: where batches will run and the
    attention kernel that `model.attention` names; its plans are made here, before the step, with
    what `fused_rows` needs. half: whether layers compute in half precision. bias: whether
    self-attention has a position bias. shard: from a batch to what the rank's model takes of it.
    """

    rows: Rows = field(kw_only=False)
    global_batch_size: int
    micro_batch_size: int
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

    def __getitem__(self, step: int) -> list[Batch]:
        share = self.global_batch_size // self.ranks
        first = step * self.global_batch_size + self.rank * share
        return [
            self.batch(range(start, start + self.micro_batch_size))
            for start in range(first, first + share, self.micro_batch_size)
        ]

    def batch(self, sample_index: range) -> Batch:
        """Returns the Batch of these samples."""
        batch = pack(
            [self.rows[i] for i in sample_index],
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
    """Yields the micro-batches of steps start, start + 1, ... without end; made before their turn in `workers` processes
    (0: in this one; None: WORKERS of the device), which end with the block, or when this process
    has died. For CUDA they lie in pinned memory, so that the step's copy does not wait.

    They never get a signal that stops a run: it reaches a whole group of processes where a launcher
    sends it, and the trainer needs its batches to finish the step.
    """
    device = steps.device_type
    workers = WORKERS.get(device, 0) if workers is None else workers
    # what is blocked in a process is so in those that it forks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        batches: Any = iter(  # what ends the workers of torch's iterator is private
            DataLoader(
                steps,
                batch_size=None,
                sampler=count(start),
                num_workers=workers,
                pin_memory=device == "cuda",
                prefetch_factor=4 if workers else None,
                persistent_workers=False,
                multiprocessing_context="fork" if workers else None,
            )
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield batches
    finally:
        if workers:  # not at the interpreter's end: that sends SIGTERM and waits for them
            batches._shutdown_workers()
            for worker in batches._workers:  # one that hangs in a read
                worker.kill()
                worker.join()
