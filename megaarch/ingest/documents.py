"""The documents of text sources: what is trained on, and what is held out."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from megaarch.config.schema import Data, Source
from megaarch.errors import UserError
from megaarch.ingest import corpus, split

LEAST_BYTES = 1000  # of a corpus


class Item(NamedTuple):
    """A document, or a supervised pair. A pair's side of the split hangs on its input alone, so
    that no held-out input is trained on with another target."""

    source: int
    side: bytes
    key: bytes
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.parts)

    @property
    def size(self) -> int:
        return sum(map(split.size_of, self.parts))


class Documents:
    """The distinct items of all sources, split. The sources are streams, read as often as needed.

    kind: "text" or "supervised". exclude: text held out elsewhere, which `train` leaves out.
    heldout: the held-out items, less the paragraphs that also stand in train. counts: of
    everything; those of train stand once `train(count=True)` is through. notes: what a person
    should know of the split.
    ValueError where there is too little text, or one side would be empty.
    """

    def __init__(
        self, sources: list[Source], kind: str, data: Data, exclude: split.Exclusion | None
    ):
        self.sources, self.kind, self.text_field = sources, kind, data.text_field
        self.exclude = exclude
        self.counts: dict[str, Any] = {"duplicates": 0}
        self._split(data.held_out)

    def _split(self, share: float) -> None:
        """The threshold climbs, up to twice the share, until what is left is the share asked
        for."""
        places = split.Places.of((item.side, item.size) for item in self._items(count=True))
        total = places.total
        if total < LEAST_BYTES:
            raise UserError(
                f"the corpus holds only {total} bytes of text: at least {LEAST_BYTES} are needed"
                if total
                else f"data source {self.sources[0].path} holds no text"
            )
        self._held_out = places.choose(share)
        while True:
            train_bytes = total - places.held_out_bytes(self._held_out)
            self.heldout, dropped = self._heldout()
            heldout_bytes = sum(item.size for item in self.heldout)
            left = heldout_bytes / (heldout_bytes + train_bytes)
            climbed = places.climb(self._held_out, share, left)
            if climbed is None:
                break
            self._held_out = climbed
        self.notes = split.notes(self._held_out, share, left)
        self.counts |= {
            "documents": len(places.sizes),
            "train_bytes": train_bytes,
            "heldout_documents": len(self.heldout),
            "heldout_bytes": heldout_bytes,
            "heldout_share": left,
            "dropped_paragraphs": dropped,
        }

    def _heldout(self) -> tuple[list[Item], int]:
        """What is left of the held-out items, and how many paragraphs were dropped from them."""
        heldout = [item for item in self._items() if item.side in self._held_out]
        if self.kind == "supervised":
            return heldout, 0
        wanted = {key for item in heldout for key in split.paragraphs(item.text)}
        shared: set[bytes] = set()
        for item in self.train():
            shared.update(wanted.intersection(split.paragraphs(item.text)))
        kept, dropped = [], 0
        for item in heldout:
            text, paragraphs = split.drop_paragraphs(item.text, shared)
            dropped += paragraphs
            if not paragraphs or any(True for _ in split.paragraphs(text)):
                kept.append(item._replace(parts=(text,)))
        return kept, dropped

    def train(self, count: bool = False) -> Iterator[Item]:
        """The items to train on, less what is excluded."""
        found = dict.fromkeys(
            ("train_documents", "train_bytes", "excluded_documents", "excluded_paragraphs"), 0
        )
        for item in self._items():
            if item.side in self._held_out:
                continue
            if self.exclude is not None:
                parts, dropped = self.exclude.strip(item.parts)
                found["excluded_paragraphs"] += dropped
                if parts is None:
                    found["excluded_documents"] += 1
                    continue
                if dropped:
                    item = item._replace(parts=parts, key=split.digest(parts[0]))
            found["train_documents"] += 1
            found["train_bytes"] += item.size
            yield item
        if count:
            self.counts |= found

    def _items(self, count: bool = False) -> Iterator[Item]:
        """The distinct items of all sources, in order; exact copies are skipped."""
        seen, duplicates = set(), 0
        for number, source in enumerate(self.sources):
            for parts in self._read(source.path):
                key = split.digest("\0".join(parts))
                if key not in seen:
                    seen.add(key)
                    yield Item(number, split.digest(parts[0]), key, parts)
                else:
                    duplicates += 1
        if count:
            self.counts["duplicates"] = duplicates

    def _read(self, path: str) -> Iterator[tuple[str, ...]]:
        if self.kind == "supervised":
            yield from corpus.pairs(path)
        else:
            yield from ((text,) for text in corpus.documents(path, self.text_field))
