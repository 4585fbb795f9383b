"""Which documents of a sharded corpus are train and which are held out: ingest/split.py over tables.

It chooses as `ingest/prepare.py` does from the texts themselves, but sees no text: digests and sizes
of documents and paragraphs are enough, and paragraphs are read shard by shard.
"""

from pathlib import Path

import numpy as np

from megaarch.errors import UserError
from megaarch.ingest import split
from megaarch.ingest.shards import read_table


class Sides:
    """The split of all shards' documents. Of equal documents the first counts, wherever it is.

    documents: how many distinct ones. train, held_out: of each shard, the rows of its table,
    int64, ascending. shared: of each shard, the uint64 digests of its held-out paragraphs that also
    stand in train, ascending. train_bytes: of text. notes: what a person should know of the split.
    ValueError where there is no text, or too little to hold `share` of it out.
    """

    def __init__(self, folder: Path, count: int, share: float):
        self._folder = folder
        tables = [read_table(n, folder, "digests", "sizes") for n in range(count)]
        digests = np.concatenate([t["digests"] for t in tables] or [np.zeros((0, 16), np.uint8)])
        sizes = np.concatenate([t["sizes"] for t in tables] or [np.zeros(0, np.int64)])
        if not len(sizes):
            raise UserError("the sources hold no text")
        self._bounds = np.cumsum([0] + [len(t["sizes"]) for t in tables])
        self._kept = _first_of_each(digests)
        self._places, self._sizes = split.places_of(digests), sizes
        self.documents = int(self._kept.sum())
        held, self.shared, self.notes = np.zeros(len(sizes), bool), [], []
        if share:
            held = self._choose(share)
            shared = self._shared(held)
            self.shared = [
                np.intersect1d(digests[mask], shared)
                for _, digests, _, mask in self._paragraphs(held)
            ]
        train = self._kept & ~held
        self.train_bytes = int(sizes[train].sum())
        self.train, self.held_out = self._rows(train), self._rows(held)

    def _choose(self, share: float) -> np.ndarray:
        """bool [documents]: what is held out."""
        places = split.Places(self._places[self._kept], self._sizes[self._kept])
        held_out = places.choose(share)
        while True:
            held = self._kept & held_out.mask(self._places)
            size = self._left(held)
            left = size / (size + places.total - places.held_out_bytes(held_out))
            climbed = places.climb(held_out, share, left)
            if climbed is None:
                self.notes = split.notes(held_out, share, left)
                return held
            held_out = climbed

    def _shared(self, held: np.ndarray) -> np.ndarray:
        """Digests of the held-out paragraphs that also stand in train."""
        wanted = [digests[mask] for _, digests, _, mask in self._paragraphs(held)]
        wanted = np.unique(np.concatenate(wanted))
        found = [
            np.intersect1d(digests[mask], wanted)
            for _, digests, _, mask in self._paragraphs(self._kept & ~held)
        ]
        return np.unique(np.concatenate(found))

    def _left(self, held: np.ndarray) -> int:
        """Bytes of the held-out documents without their shared paragraphs. A document of which
        none is left but short ones goes whole."""
        shared = self._shared(held)
        left = 0
        for shard, digests, table, mask in self._paragraphs(held):
            owner = np.repeat(np.arange(len(table["counts"])), table["counts"])
            drop = mask & np.isin(digests, shared)
            size = self._sizes[shard].astype(np.float64)  # exact up to 2**53
            size -= np.bincount(owner, table["spans"] * drop, len(size))
            dropped = np.bincount(owner, drop, len(size))
            gone = (dropped > 0) & (dropped == table["counts"])
            left += int(size[held[shard] & ~gone].sum())
        return left

    def _paragraphs(self, chosen: np.ndarray):
        """Of each shard: its slice of the documents, its paragraphs' digests, its table, and which
        paragraphs are those of `chosen` documents."""
        for number in range(len(self._bounds) - 1):
            table = read_table(number, self._folder, "paragraphs", "spans", "counts")
            shard = slice(*self._bounds[number : number + 2])
            yield shard, table["paragraphs"], table, np.repeat(chosen[shard], table["counts"])

    def _rows(self, chosen: np.ndarray) -> list[np.ndarray]:
        pairs = zip(self._bounds, self._bounds[1:])
        return [np.flatnonzero(chosen[start:end]) for start, end in pairs]


def _first_of_each(digests: np.ndarray) -> np.ndarray:
    """bool [n]: the first row of each distinct digest."""
    keys = np.ascontiguousarray(digests).view("V16")[:, 0]
    first = np.zeros(len(digests), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first
