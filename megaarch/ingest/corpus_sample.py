"""A sample of a corpus that may be larger than memory."""

import heapq
from collections.abc import Iterable

from megaarch.errors import UserError
from megaarch.ingest import corpus, split


def sample(sources: Iterable[str], text_field: str, most: int, held_out: float = 0.0) -> list[str]:
    """Returns up to `most` distinct documents of the sources, in the order of the text.

    These have the lowest hashes, so they are the same in any order; none that a split of
    the share `held_out` may hold out (its threshold climbs to about twice the share at most, and
    further only where there are few documents).
    UserError: a source is missing or malformed; the share is not one; nothing is left.
    """
    if not 0 <= held_out < 0.5:
        raise UserError(f"--held-out is a share from 0 to below 0.5 here, not {held_out}")
    chosen: list[tuple[int, int, str]] = []  # a heap: the highest hash first
    keys: set[bytes] = set()
    for number, text in enumerate(_documents(sources, text_field)):
        key = split.digest(text)
        # bytes 8 to 16: the first eight say which side of the split it is on
        rank = -int.from_bytes(key[8:], "big")
        if key in keys or split.place(key) < 2 * held_out:
            continue
        if len(chosen) < most:
            heapq.heappush(chosen, (rank, -number, text))
        elif rank > chosen[0][0]:
            _, _, dropped = heapq.heapreplace(chosen, (rank, -number, text))
            keys.discard(split.digest(dropped))
        else:
            continue
        keys.add(key)
    if not chosen:
        raise UserError(
            "no document is left to train a tokenizer on: give more text, or a lower --held-out"
        )
    return [text for _, _, text in sorted(chosen, key=lambda row: -row[1])]


def _documents(sources: Iterable[str], text_field: str):
    for source in sources:
        kind = corpus.kind(source, text_field)
        if kind != "text":
            raise UserError(f"data source {source} is {kind}: a tokenizer is trained on text")
        yield from corpus.documents(source, text_field)
