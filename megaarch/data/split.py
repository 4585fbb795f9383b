"""Train and held-out: split by document, before anything is learned from the text.

A document is held out iff the hash of its text, as a fraction of 2^64, is below a threshold. So
its side depends on nothing but the text and the threshold, and not on order or on neighbours.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import numpy as np

RUNGS = 16  # the threshold climbs in sixteenths of the share
LEAST_PARAGRAPH = 40  # characters; shorter ones are headings and boilerplate
BLANK_LINES = re.compile(r"(\n\s*\n)")


def digest(text: str) -> bytes:
    """blake2b of the text, 128 bits: tells documents apart and places them in the split."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def place(key: bytes) -> float:
    """Where a digest lies in [0, 1)."""
    return (int.from_bytes(key[:8], "big") >> 11) * 2.0**-53


def places_of(digests: np.ndarray) -> np.ndarray:
    """`place` of many: uint8 [n, 16] to float64 [n]."""
    leading = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
    return (leading >> np.uint64(11)).astype(np.float64) * 2.0**-53


def first_threshold(share: float) -> float:
    """The lowest threshold there is for a share: what lies below it is always held out."""
    return share * (1 + 1 / RUNGS)


class Places:
    """Where the distinct documents of a corpus lie, in [0, 1), and how many bytes each of them is."""

    def __init__(self, places: np.ndarray, sizes: np.ndarray):
        self.places, self.sizes = places, sizes

    @classmethod
    def of(cls, rows: Iterable[tuple[bytes, int]]) -> "Places":
        """rows: (digest, bytes) of each."""
        found = [(place(key), size) for key, size in rows]
        sizes = np.array([row[1] for row in found], dtype=np.int64)
        return cls(np.array([row[0] for row in found]), sizes)

    def below(self, threshold: float) -> int:
        """Bytes of the documents that the threshold holds out."""
        return int(self.sizes[self.places < threshold].sum())

    def threshold(self, share: float, least: float = 0.0) -> float:
        """The first of share·17/16, share·18/16, ... that is at least `least` and holds out at
        least `share` of the bytes.

        A large corpus meets the first rung with room to spare, so appending documents to it moves
        none of the old ones; a small one climbs as far as chance asks for.
        ValueError where one side would be empty.
        """
        total = int(self.sizes.sum())
        rung = max(1, math.ceil(RUNGS * (least / share - 1)))
        while share * (1 + rung / RUNGS) < 1:
            threshold = share * (1 + rung / RUNGS)
            held_out = self.below(threshold)
            if 0 < held_out < total and held_out >= share * total:
                return threshold
            rung += 1
        raise ValueError(
            f"the corpus has too few documents ({len(self.sizes)}) to hold out {share:.0%} of its "
            "text: add documents, or divide a long text by lines <|endoftext|>"
        )

    def climbed(self, threshold: float, share: float, left: float) -> float | None:
        """The threshold to try next, where `threshold` holds out only the share `left` once the
        paragraphs that also stand in train are dropped. None: it is enough, or twice the share."""
        if left >= share or threshold >= 2 * share:
            return None
        wanted = min(threshold * share / left if left else 1.0, 2 * share)
        return self.threshold(share, max(wanted, threshold + share / RUNGS))


def paragraphs(text: str) -> Iterator[bytes]:
    """Digests, 64 bits, of the paragraphs that are long enough to be told from boilerplate."""
    for paragraph, _ in spaced_paragraphs(text):
        if key := paragraph_digest(paragraph):
            yield key


def spaced_paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """(paragraph, the blank lines after it); joined again they are the text."""
    pieces = BLANK_LINES.split(text)
    return zip(pieces[::2], [*pieces[1::2], ""], strict=True)


def paragraph_digest(paragraph: str) -> bytes | None:
    """None for a paragraph that is too short to count."""
    paragraph = paragraph.strip()
    return digest(paragraph)[:8] if len(paragraph) >= LEAST_PARAGRAPH else None


def drop_paragraphs(text: str, shared: Set[bytes]) -> tuple[str, int]:
    """The text without the paragraphs in `shared`, and how many those were."""
    kept, dropped = "", 0
    for paragraph, space in spaced_paragraphs(text):
        if paragraph_digest(paragraph) in shared:
            dropped += 1
        else:
            kept += paragraph + space
    return kept, dropped


@dataclass(frozen=True)
class Exclusion:
    """Text that is held out elsewhere and must not be trained on.

    keys: digests of whole texts and of their paragraphs.
    """

    keys: frozenset[bytes]

    @classmethod
    def of(cls, documents: Iterable[str], pairs: Iterable[tuple[str, str]] = ()) -> "Exclusion":
        """Of held-out documents, and of held-out (input, target) pairs."""
        keys = set()
        for text in documents:
            keys.update([digest(text.strip()), *paragraphs(text)])
        for source, target in pairs:
            keys.update([digest(source.strip()), *paragraphs(source), *paragraphs(target)])
        return cls(frozenset(keys))

    @property
    def fingerprint(self) -> str:
        """Of the keys, whatever their order."""
        return hashlib.blake2b(b"".join(sorted(self.keys)), digest_size=10).hexdigest()

    def strip(self, parts: tuple[str, ...]) -> tuple[tuple[str, ...] | None, int]:
        """A document's or a pair's parts without what is excluded, None where nothing is left, and
        how many paragraphs were dropped. A pair goes whole."""
        if any(digest(part.strip()) in self.keys for part in parts):
            return None, 0
        if len(parts) > 1:
            shared = any(key in self.keys for part in parts for key in paragraphs(part))
            return (None if shared else parts), 0
        text, dropped = drop_paragraphs(parts[0], self.keys)
        return ((text,) if text.strip() else None), dropped
