"""Train and held-out: split by document, before anything is learned from the text.

A document is held out iff the hash of its text, as a fraction of 2^64, is below a threshold. So
its side depends on nothing but the text and the threshold, and not on order or on neighbours. (But
for one that is so much of the corpus that it would upset the split: `Places.choose`.)
"""

import hashlib
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import numpy as np

from megaarch.errors import UserError

FAR = 2  # times the share, or below the share by as much: far from what was asked for
LARGE = 0.5  # of the share that is to be held out: a document that may upset the split
RUNGS = 16  # the threshold climbs in sixteenths of the share
LEAST_PARAGRAPH = 40  # characters; shorter ones are headings and boilerplate
BLANK_LINES = re.compile(r"(\n\s*\n)")


def digest(text: str) -> bytes:
    """blake2b of the text, 128 bits: tells documents apart and places them in the split."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def place(key: bytes) -> float:
    """Maps a digest to [0, 1)."""
    return (int.from_bytes(key[:8], "big") >> 11) * 2.0**-53


def size_of(text: str) -> int:
    """Counts UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode())


def is_large(size, share: float, total: int):
    """Whether a document of so many bytes, or which of several, may upset the split of `total`.
    What is large of a corpus is large of any part of it."""
    return size > LARGE * share * total


def first_threshold(share: float) -> float:
    """The lowest threshold there is for a share: what lies below it is held out, unless it is LARGE
    of the text."""
    return share * (1 + 1 / RUNGS)


@dataclass(frozen=True)
class HeldOut:
    """The documents that are held out: those whose place is below `threshold`.

    kept: places of documents that are train all the same, each of them LARGE of the text.
    """

    threshold: float
    kept: frozenset[float] = frozenset()

    def mask(self, places: np.ndarray) -> np.ndarray:
        """Which of these places are held out, bool [n]."""
        below = places < self.threshold
        return below & ~np.isin(places, list(self.kept)) if self.kept else below


class Places:
    """Where the distinct documents of a corpus lie, in [0, 1), and how many bytes each of them is.

    Pairs of one input lie at one place, and go to one side.
    """

    def __init__(self, places: np.ndarray, sizes: np.ndarray):
        self.places, self.sizes = places, sizes
        self.total = int(sizes.sum())

    def held_out_bytes(self, held_out: HeldOut) -> int:
        return int(self.sizes[held_out.mask(self.places)].sum())

    def choose(self, share: float) -> HeldOut:
        """Returns the first threshold of share·17/16, share·18/16, ... that holds out at least `share` of
        the bytes.

        A large corpus meets the first rung with room to spare, so appending documents to it moves
        none of the old ones; a small one climbs as far as chance asks for. Where that would be more
        than twice the share, large documents stay in train (all that are more than the share, all
        that are LARGE, or the largest), whichever holds out the least.
        UserError where one side would be empty, or more than twice the share and half of the text
        would be held out.
        """
        chosen = self._choose(share, least=0.0)
        if chosen is None:
            raise UserError(
                f"the corpus has too few documents ({len(self.sizes)}) to hold out {share:.2%} of "
                "its text: add documents, or divide a long text (the longest has "
                f"{self.sizes.max() / self.total:.1%} of it) by lines <|endoftext|>"
            )
        return chosen

    def climb(self, held_out: HeldOut, share: float, left: float) -> HeldOut | None:
        """Returns what to try next, where `held_out` leaves only the share `left` without the
        paragraphs that also stand in train. None: it is enough, twice the share, or all there
        is."""
        threshold = held_out.threshold
        if left >= share or threshold >= 2 * share:
            return None
        wanted = min(threshold * share / left if left else 1.0, 2 * share)
        return self._choose(share, max(wanted, threshold + share / RUNGS))

    def _choose(self, share: float, least: float) -> HeldOut | None:
        usual = self._climbed(share, least, frozenset())
        if usual and self.held_out_bytes(usual) <= FAR * share * self.total:
            return usual
        others = [self._climbed(share, least, kept) for kept in self._large(share) if kept]
        found = [held_out for held_out in (usual, *others) if held_out]
        chosen = min(found, key=self.held_out_bytes, default=None)
        if chosen and self.held_out_bytes(chosen) > max(FAR * share, 0.5) * self.total:
            return None
        return chosen

    def _climbed(self, share: float, least: float, kept: frozenset[float]) -> HeldOut | None:
        """The first rung, where some documents stay in train; None where there is none."""

        def size_at(rung: int) -> int:
            return self.held_out_bytes(HeldOut(share * (1 + rung / RUNGS), kept))

        first, behind = (math.ceil(RUNGS * (at / share - 1)) for at in (least, 1.0))
        rungs = range(max(1, first), behind)
        place = bisect_left(rungs, share * self.total, key=size_at)
        if place == len(rungs) or size_at(rungs[place]) == self.total:
            return None
        return HeldOut(share * (1 + rungs[place] / RUNGS), kept)

    def _large(self, share: float) -> list[frozenset[float]]:
        """The places of what may stay in train, in three ways."""
        places, of_row = np.unique(self.places, return_inverse=True)
        sizes = np.bincount(of_row, self.sizes, len(places))
        large, largest = is_large(sizes, share, self.total), np.arange(len(sizes)) == sizes.argmax()
        chosen = [sizes > share * self.total, large, large & largest]
        return [frozenset(places[mask].tolist()) for mask in chosen]


def notes(held_out: HeldOut, share: float, left: float) -> list[str]:
    """Returns warnings about a split that holds out the share `left` of the bytes."""
    figures = f"{left:.2%} of the text is held out, where {share:.2%} was asked for"
    if held_out.kept:
        return [
            f"documents of more than {LARGE * share:.2%} of the text each ({len(held_out.kept)} "
            f"here) stay in train, whatever their hash: {figures}"
        ]
    if not share / FAR <= left <= share * FAR:
        return [
            f"{figures}: the documents are few or long, or share their paragraphs; add text, or "
            "divide a long one by lines <|endoftext|>"
        ]
    return []


def paragraphs(text: str) -> Iterator[bytes]:
    """Yields 64-bit digests of the paragraphs that are longer than boilerplate."""
    for paragraph, _ in spaced_paragraphs(text):
        if key := paragraph_digest(paragraph):
            yield key


def spaced_paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Yields (paragraph, the blank lines after it), which joined are the text."""
    pieces = BLANK_LINES.split(text)
    return zip(pieces[::2], [*pieces[1::2], ""], strict=True)


def paragraph_digest(paragraph: str) -> bytes | None:
    """Returns None for a paragraph that is too short to count."""
    paragraph = paragraph.strip()
    return digest(paragraph)[:8] if len(paragraph) >= LEAST_PARAGRAPH else None


def drop_paragraphs(text: str, digests: Set[bytes]) -> tuple[str, int]:
    """Returns the text without the paragraphs of these digests, and how many those were."""
    kept, dropped = [], 0
    for paragraph, space in spaced_paragraphs(text):
        if paragraph_digest(paragraph) in digests:
            dropped += 1
        else:
            kept += [paragraph, space]
    return "".join(kept), dropped


@dataclass(frozen=True)
class Exclusion:
    """Text that is held out elsewhere and must not be trained on.

    keys: digests of whole texts and of their paragraphs.
    """

    keys: frozenset[bytes]

    @classmethod
    def of(cls, documents: Iterable[str], pairs: Iterable[tuple[str, str]] = ()) -> "Exclusion":
        """Excludes held-out documents, and held-out (input, target) pairs."""
        keys = set()
        for text in documents:
            keys.update([digest(text.strip()), *paragraphs(text)])
        for source, target in pairs:
            keys.update([digest(source.strip()), *paragraphs(source), *paragraphs(target)])
        return cls(frozenset(keys))

    def paragraphs(self) -> np.ndarray:
        """Returns the digests of paragraphs, uint64 [n]."""
        return np.frombuffer(b"".join(key for key in self.keys if len(key) == 8), "<u8")

    @property
    def fingerprint(self) -> str:
        """The hash of the keys, whatever their order."""
        return hashlib.blake2b(b"".join(sorted(self.keys)), digest_size=10).hexdigest()

    def strip(self, parts: tuple[str, ...]) -> tuple[tuple[str, ...] | None, int]:
        """Returns a document's or a pair's parts less what is excluded, None where nothing is left,
        and how many paragraphs were dropped. A pair goes whole."""
        if any(digest(part.strip()) in self.keys for part in parts):
            return None, 0
        if len(parts) == 1:
            text, dropped = drop_paragraphs(parts[0], self.keys)
            return ((text,) if text.strip() else None), dropped
        found = any(key in self.keys for part in parts for key in paragraphs(part))
        return (None if found else parts), 0
