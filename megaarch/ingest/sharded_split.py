"""The train/held-out split of a sharded corpus: the rule of split.py over the rows of all shards.

It sees no text: digests and sizes of documents and paragraphs are enough, and paragraphs are read
shard by shard.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megaarch.ingest import split
from megaarch.ingest.shards import DOCUMENT, EXCLUDED, Job


class ShardedSplit:
    """Assigns the documents of all shards to train or held-out. The first of equal documents
    counts, in whatever shard.

    documents, total: how many distinct ones there are, and their bytes. Further, after `choose`:
    train, held_out: of each shard, which of its documents, bool [documents]; train is without those
    that Job.exclude leaves nothing of. overlap: of each shard, the uint64 digests of its held-out
    paragraphs that also stand in train. train_bytes: of train; train_side_bytes: with what is excluded
    from it. notes: warnings about the split.
    """

    def __init__(self, job: Job, count: int):
        self._job = job
        self._bounds = np.cumsum([0] + [len(job.documents(n)) for n in range(count)])
        self._sizes, self._places = self._column("size"), self._column("place")
        self._first = _first_of_each(self._column("key"))
        self._train_sizes = self._column("train_size")
        self._excluded = self._train_sizes == EXCLUDED
        self.documents = int(self._first.sum())
        self.total = int(self._sizes[self._first].sum())

    def choose(self, share: float) -> None:
        """Holds out `share` of the bytes; 0 holds out nothing.

        UserError where there is too little text for that.
        """
        held, self.notes = np.zeros(len(self._sizes), bool), []
        self.overlap: list[np.ndarray] = []
        if share:
            held, overlap = self._climb(share)
            found = self._paragraphs(held)
            self.overlap = [_among(p.digests[p.chosen], overlap) for p in found]
        train = self._first & ~held
        self.train_side_bytes = int(self._sizes[train].sum())
        self.excluded_documents = int((train & self._excluded).sum())
        self.excluded_paragraphs = int(self._column("dropped")[train].sum())
        train &= ~self._excluded
        self.train_bytes = int(self._train_sizes[train].sum())
        self.train, self.held_out = (np.split(x, self._bounds[1:-1]) for x in (train, held))

    def _climb(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Raises the threshold, up to twice the share, until what is left of the held-out documents
        is the share asked for. Returns which documents are held out, bool [documents], and the
        overlap of them all."""
        places = split.Places(self._places[self._first], self._sizes[self._first])
        held_out = places.choose(share)
        while True:
            held = self._first & held_out.mask(self._places)
            overlap = self._overlap(held)
            size = self._size_without(overlap, held)
            left = size / (size + places.total - places.held_out_bytes(held_out))
            climbed = places.climb(held_out, share, left)
            if climbed is None:
                self.notes = split.notes(held_out, share, left)
                return held, overlap
            held_out = climbed

    def _overlap(self, held: np.ndarray) -> np.ndarray:
        """Returns the digests of held-out paragraphs that also stand in train, ascending."""
        wanted = np.unique(np.concatenate([p.digests[p.chosen] for p in self._paragraphs(held)]))
        train = self._paragraphs(self._first & ~held & ~self._excluded)
        found = np.unique(np.concatenate([_among(p.digests[p.chosen], wanted) for p in train]))
        exclude = self._job.exclude
        return np.setdiff1d(found, exclude.paragraphs()) if exclude else found

    def _size_without(self, overlap: np.ndarray, held: np.ndarray) -> int:
        """Returns the bytes of held-out documents without the overlap. A document that keeps only
        short paragraphs goes whole."""
        left = 0
        for p in self._paragraphs(held):
            owner = np.repeat(np.arange(len(p.counts)), p.counts)
            drop = p.chosen & _is_among(p.digests, overlap)
            size = self._sizes[p.documents].astype(np.float64)  # exact up to 2**53
            size -= np.bincount(owner, p.spans * drop, len(size))
            dropped = np.bincount(owner, drop, len(size))
            gone = (dropped > 0) & (dropped == p.counts)
            left += int(size[held[p.documents] & ~gone].sum())
        return left

    def _paragraphs(self, documents: np.ndarray) -> "Iterator[_Paragraphs]":
        """Yields the paragraphs of each shard. documents: bool [documents], whose are chosen."""
        for number, (start, end) in enumerate(zip(self._bounds, self._bounds[1:])):
            counts = self._job.documents(number)["paragraphs"]
            chosen = np.repeat(documents[start:end], counts)
            rows = self._job.paragraphs(number)
            yield _Paragraphs(slice(start, end), counts, rows["digest"], rows["span"], chosen)

    def _column(self, name: str) -> np.ndarray:
        """Returns a field of all shards' DOCUMENT rows."""
        shards = range(len(self._bounds) - 1)
        columns = [np.array(self._job.documents(number)[name]) for number in shards]
        return np.concatenate([np.zeros(0, DOCUMENT[name]), *columns])


class _Paragraphs(NamedTuple):
    """The paragraphs of a shard: its slice of the documents, how many each has, and of each its
    digest, its span and whether its document is chosen."""

    documents: slice
    counts: np.ndarray
    digests: np.ndarray
    spans: np.ndarray
    chosen: np.ndarray


def _among(digests: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Returns those of `digests` that are in `ascending`, each once, in order."""
    return np.unique(digests[_is_among(digests, ascending)])


def _is_among(digests: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Marks those of `digests` that are in `ascending`, bool [n]. numpy's own would sort both, which for
    the held-out paragraphs of a large corpus takes minutes a shard."""
    if not len(ascending):
        return np.zeros(len(digests), bool)
    at = np.minimum(np.searchsorted(ascending, digests), len(ascending) - 1)
    return ascending[at] == digests


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    """Marks the first row of each distinct key, bool [n]."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first
