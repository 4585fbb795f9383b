"""Text to tokens, shard by shard, in one process or in many:

    sources ──> shards ──> digests, tokens ──> split ──> train (.bin/.idx), held-out documents

`prepare` runs it for a run's own text and `preprocess` for a batch job. What comes out depends on
the text, the tokenizer and the options, never on which process made which shard.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from megaarch.files import replacing
from megaarch.ingest import lines, shards, split
from megaarch.ingest.indexed_dataset import mapped, writing_dataset
from megaarch.ingest.lines import Shard
from megaarch.ingest.manifest import Counts
from megaarch.ingest.sharded_split import ShardedSplit
from megaarch.ingest.shards import ABSENT, Job, Summary

Progress = Callable[[int, int, Summary, bool], None]  # done, of, the shard's, found finished


class Pipeline:
    """The shards of a corpus on their way.

    executor: of the processes that work; None works here. summaries: of each shard, after `make`.
    split: after `open_split`. held_out: documents, bytes and dropped paragraphs, after `write_held_out`.
    """

    def __init__(self, job: Job, cut: list[Shard], executor: Executor | None = None):
        self.job, self.shards, self.executor = job, cut, executor

    def make(self, progress: Progress = lambda *_: None, resume: bool = False) -> None:
        """Makes the files of all shards. resume: those that are finished are verified and kept."""
        found: dict[int, Summary] = {}
        for number in range(len(self.shards) if resume else 0):
            if summary := shards.finished(number, self.job):
                found[number] = summary
                progress(len(found), len(self.shards), summary, True)
        left = (n for n in range(len(self.shards)) if n not in found)
        tasks = [(n, self.shards[n], self.job) for n in left]
        for number, summary in each(self.executor, shards.make, tasks):
            found[number] = summary
            progress(len(found), len(self.shards), summary, False)
        self.summaries = [found[number] for number in range(len(self.shards))]

    def open_split(self) -> ShardedSplit:
        """Opens the documents of all shards, to be split by `ShardedSplit.choose`."""
        self.split = ShardedSplit(self.job, len(self.shards))
        return self.split

    def write_held_out(self, path: Path) -> None:
        """Writes the held-out documents as JSON lines, less the paragraphs that also stand in
        train."""
        tasks = []
        for number, held in enumerate(self.split.held_out):
            if held.any():
                ordinals, overlap = self.job.documents(number)["ordinal"][held], self.split.overlap
                tasks.append((number, self.shards[number], self.job, ordinals, overlap[number]))
        counts = dict(each(self.executor, shards.write_held_out, tasks))
        with replacing(path) as aside, aside.open("wb") as out:
            for number in sorted(counts):
                with self.job.file(number, ".heldout.jsonl").open("rb") as file:
                    shutil.copyfileobj(file, out, lines.BLOCK)
        self.held_out = [sum(row[k] for row in counts.values()) for k in range(3)]

    def write_train(self, path: str | Path, numbers: Iterable[int]) -> None:
        """Writes the train documents of these shards as an indexed dataset."""
        dtype, sequences = self.job.dtype, len(self.job.fields)
        with writing_dataset(path, dtype) as writer:
            for number in numbers:
                table, kept = self.job.documents(number), self.split.train[number]
                lengths = table["tokens"][:, :sequences]
                assert (lengths[kept] != ABSENT).all(), "what is in train was tokenized"
                ends = np.append(0, np.cumsum(np.maximum(lengths, 0).sum(1)))
                tokens = mapped(self.job.file(number, ".bin"), dtype)
                for start, end in _runs(kept):
                    writer.add_documents(tokens[ends[start] : ends[end]], lengths[start:end])

    def sample(self, share: float) -> Iterator[str]:
        """Yields about `share` of the train documents, chosen by hash."""
        for number, kept in enumerate(self.split.train):
            table = self.job.documents(number)[kept]
            # the first eight bytes say which side of the split it is on
            keys = [split.place(key.tobytes()[8:]) < share for key in table["train_key"]]
            ordinals = table["ordinal"][np.array(keys, bool)]
            for parts in shards.read_rows(self.shards[number], self.job, ordinals):
                if self.job.exclude:
                    parts, _ = self.job.exclude.strip(parts)
                yield "\n".join(parts or ())

    def train_keys(self) -> Iterator[bytes]:
        """Yields for each shard the digests of its train documents, less what is excluded."""
        for number, kept in enumerate(self.split.train):
            yield self.job.documents(number)["train_key"][kept].tobytes()

    def counts(self, train_tokens: int) -> Counts:
        """Returns the counts of the corpus."""
        found = self.split
        documents, size, dropped = self.held_out
        return Counts(
            documents=found.documents,
            duplicates=sum(s.documents + s.duplicates for s in self.summaries) - found.documents,
            train_documents=sum(int(kept.sum()) for kept in found.train),
            train_bytes=found.train_bytes,
            train_tokens=train_tokens,
            heldout_documents=documents,
            heldout_bytes=size,
            dropped_paragraphs=dropped,
            notes=found.notes,
        )


def _runs(chosen: np.ndarray) -> list[list[int]]:
    """Returns where each run of True begins and ends. chosen: bool [n]."""
    return np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2).tolist()


def each(
    executor: Executor | None, function: Callable, tasks: list[tuple]
) -> Iterator[tuple[int, Any]]:
    """Yields (number, function(number, ...)) of every task (number, ...), as they end. The first error
    ends them all."""
    if executor is None:
        for task in tasks:
            yield task[0], function(*task)
        return
    futures = {executor.submit(function, *task): task[0] for task in tasks}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()
