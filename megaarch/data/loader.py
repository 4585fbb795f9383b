"""The loader: the micro-batches of step s, as a pure function of the settings and s.

It holds no state: a run resumes from one integer. Workers make steps ahead of the trainer.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from megaarch.attention import warm
from megaarch.data.batch import Batch
from megaarch.data.packing import pack
from megaarch.data.rows import Rows


class Steps(torch.utils.data.Dataset):
    """`steps[s]` is the list of micro-batches of step s for one data-parallel rank.

    global_batch_size, micro_batch_size: rows. rank, ranks: place among the data-parallel ranks;
    a step's rows are dealt out in contiguous shares. multiple: of which streams' lengths are stored
    (what that adds is no padding that counts). device_type: where batches will run; the kernels'
    plans of their parts are made here, ahead of the step.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        multiple: int = 1,
        device_type: str = "cpu",
    ):
        assert global_batch_size % (micro_batch_size * ranks) == 0
        self.rows = rows
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.ranks, self.device_type = rank, ranks, device_type
        self.shape = rows.shape.stretched(multiple)

    def __getitem__(self, step: int) -> list[Batch]:
        share = self.global_batch_size // self.ranks
        first = step * self.global_batch_size + self.rank * share
        return [
            self.batch(range(start, start + self.micro_batch_size))
            for start in range(first, first + share, self.micro_batch_size)
        ]

    def batch(self, sample_index: range) -> Batch:
        """The Batch of these samples."""
        batch = pack(
            [self.rows[i] for i in sample_index],
            self.shape,
            pad=self.rows.vocabulary.pad,
            axes=self.rows.axes,
            sample_index=sample_index,
        )
        slots = tuple(len(sample_index) * length for length in self.rows.shape.streams)
        batch = replace(batch, counts=replace(batch.counts, slots=slots))
        for stream in batch.streams:
            for parts in (stream.parts, stream.cross):
                if parts is not None:
                    warm(parts, self.device_type)
        return batch


class _From(torch.utils.data.Sampler):
    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


def prefetch(steps: Steps, start: int, workers: int) -> Iterator[list[Batch]]:
    """Micro-batches of steps start, start + 1, ... without end; made ahead in `workers` processes
    (0: in this one)."""
    return iter(
        DataLoader(
            steps,
            batch_size=None,
            sampler=_From(start),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            persistent_workers=False,
            multiprocessing_context="fork" if workers else None,
        )
    )
