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
from megaarch.ingest.indexed_dataset import IndexedWriter, mapped
from megaarch.ingest.lines import Shard
from megaarch.ingest.manifest import Counts
from megaarch.ingest.sharded_split import ShardedSplit
from megaarch.ingest.shards import ABSENT, Job, Summary

TOKENS = 1 << 24  # that are copied at once

Progress = Callable[[int, int, Summary, bool], None]  # done, of, the shard's, found finished


class Pipeline:
    """The shards of a corpus on their way.

    executor: of the processes that work; None works here. summaries: of each shard, after `make`.
    split: after `open_split`.
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
        tasks = {n: (n, self.shards[n], self.job) for n in left}
        for number, summary in each(self.executor, shards.make, tasks):
            found[number] = summary
            progress(len(found), len(self.shards), summary, False)
        self.summaries = [found[number] for number in range(len(self.shards))]

    def open_split(self) -> ShardedSplit:
        """Opens the documents of all shards, to be split by `ShardedSplit.choose`."""
        self.split = ShardedSplit(self.job, len(self.shards))
        return self.split

    def write_held_out(self, path: Path) -> tuple[int, int, int]:
        """Writes the held-out documents as JSON lines, less the paragraphs that also stand in
        train. Returns how many documents, bytes and dropped paragraphs those are."""
        tasks = {}
        for number, rows in enumerate(self.split.held_out):
            if len(rows):
                ordinals = self.job.documents(number)["ordinal"][rows]
                tasks[number] = (
                    number,
                    self.shards[number],
                    self.job,
                    ordinals,
                    self.split.overlap[number],
                )
        counts = dict(each(self.executor, shards.write_held_out, tasks))
        with replacing(path) as aside, aside.open("wb") as out:
            for number in sorted(counts):
                with self.job.file(number, ".heldout.jsonl").open("rb") as file:
                    shutil.copyfileobj(file, out, lines.BLOCK)
        documents, size, dropped = (sum(row[k] for row in counts.values()) for k in range(3))
        return documents, size, dropped

    def write_train(self, path: str | Path, numbers: Iterable[int]) -> None:
        """Writes the train documents of these shards as an indexed dataset."""
        dtype, sequences = self.job.dtype, len(self.job.fields)
        with IndexedWriter(path, dtype) as writer:
            for number in numbers:
                table, rows = self.job.documents(number), self.split.train[number]
                lengths, kept = table["tokens"][:, :sequences], np.zeros(len(table), bool)
                kept[rows] = True
                assert (lengths[rows] != ABSENT).all(), "what is in train was tokenized"
                lengths = np.maximum(lengths, 0)
                tokens = mapped(self.job.file(number, ".bin"), dtype)
                for block, ids in _blocks(lengths.sum(1), tokens):
                    chosen = kept[block]
                    ids = ids[np.repeat(chosen, lengths[block].sum(1))]
                    writer.add_documents(ids, lengths[block][chosen])

    def sample(self, share: float) -> Iterator[str]:
        """Yields about `share` of the train documents, chosen by hash."""
        for number, rows in enumerate(self.split.train):
            table = self.job.documents(number)[rows]
            # the first eight bytes say which side of the split it is on
            keys = [split.place(key.tobytes()[8:]) < share for key in table["train_key"]]
            ordinals = table["ordinal"][np.array(keys, bool)]
            for parts in shards.read_rows(self.shards[number], self.job, ordinals):
                if self.job.exclude:
                    parts, _ = self.job.exclude.strip(parts)
                yield "\n".join(parts or ())

    def train_keys(self) -> Iterator[bytes]:
        """Yields for each shard the digests of its train documents, less what is excluded."""
        for number, rows in enumerate(self.split.train):
            yield self.job.documents(number)["train_key"][rows].tobytes()

    def counts(self, held_out: tuple[int, int, int], train_tokens: int) -> Counts:
        """Returns the counts of the corpus. held_out: what `write_held_out` returns."""
        found = self.split
        documents, size, dropped = held_out
        return Counts(
            documents=found.documents,
            duplicates=sum(s.documents + s.duplicates for s in self.summaries) - found.documents,
            train_documents=sum(map(len, found.train)),
            train_bytes=found.train_bytes,
            train_tokens=train_tokens,
            heldout_documents=documents,
            heldout_bytes=size,
            dropped_paragraphs=dropped,
            notes=found.notes,
        )


def _blocks(sizes: np.ndarray, tokens: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields runs of documents, of up to TOKENS tokens unless one alone has more, and their tokens.

    sizes: of each document, int64. tokens: of all, a view.
    """
    ends = np.cumsum(sizes)
    start = at = 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(ends, at + TOKENS, side="right")))
        yield slice(start, stop), tokens[at : ends[stop - 1]]
        start, at = stop, int(ends[stop - 1])


def each(
    executor: Executor | None, function: Callable, tasks: dict[int, tuple]
) -> Iterator[tuple[int, Any]]:
    """Yields (key, function(*task)) of every task, as they end. The first error ends them all."""
    if executor is None:
        for key, task in tasks.items():
            yield key, function(*task)
        return
    futures = {executor.submit(function, *task): key for key, task in tasks.items()}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()
