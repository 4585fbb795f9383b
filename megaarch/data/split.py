"""Train and held-out: split by document, before anything is learned from the text.

A document is held out iff the hash of its text, as a fraction of 2^64, is below a threshold. So
its side depends on nothing but the text and the threshold, and not on order or on neighbours.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator

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


class Places:
    """Where the documents of a corpus lie, and how many bytes each of them is.

    rows: (digest, bytes) of distinct documents.
    """

    def __init__(self, rows: Iterable[tuple[bytes, int]]):
        found = [(place(key), size) for key, size in rows]
        self.places = np.array([row[0] for row in found])
        self.sizes = np.array([row[1] for row in found], dtype=np.int64)

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


def paragraphs(text: str) -> Iterator[bytes]:
    """Digests of the paragraphs that are long enough to be told from boilerplate."""
    for paragraph in BLANK_LINES.split(text)[::2]:
        if len(paragraph.strip()) >= LEAST_PARAGRAPH:
            yield digest(paragraph.strip())


def drop_paragraphs(text: str, shared: set[bytes]) -> tuple[str, int]:
    """The text without the paragraphs in `shared`, and how many those were."""
    pieces = BLANK_LINES.split(text)
    kept, dropped = "", 0
    for paragraph, space in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        if any(key in shared for key in paragraphs(paragraph)):
            dropped += 1
        else:
            kept += paragraph + space
    return kept, dropped
