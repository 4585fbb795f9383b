"""A sample of a corpus that may be larger than memory."""

from collections.abc import Iterable

from megaarch.errors import UserError
from megaarch.ingest import corpus, split

# Documents that are kept beyond the sample, at most as many again, before the highest hashes go.
SPARE = 1 << 14


def sample(sources: Iterable[str], text_field: str, most: int, held_out: float = 0.0) -> list[str]:
    """Returns up to `most` distinct documents of the sources, in the order of the text.

    These have the lowest hashes, so they are the same in any order; none that a split of
    the share `held_out` may hold out (its threshold climbs to about twice the share at most, and
    further only where there are few documents).
    UserError: a source is missing or malformed; the share is not one; nothing is left.
    """
    if not 0 <= held_out < 0.5:
        raise UserError(f"--held-out is a share from 0 to below 0.5 here, not {held_out}")
    texts: dict[bytes, str] = {}
    for text in _documents(sources, text_field):
        key = split.digest(text)
        if split.place(key) >= 2 * held_out:
            texts.setdefault(key, text)
        if len(texts) > most + min(most, SPARE):
            texts = _lowest(texts, most)
    if not texts:
        raise UserError(
            "no document is left to train a tokenizer on: give more text, or a lower --held-out"
        )
    return list(_lowest(texts, most).values())


def _lowest(texts: dict[bytes, str], most: int) -> dict[bytes, str]:
    # bytes 8 to 16: the first eight say which side of the split it is on
    kept = set(sorted(texts, key=lambda key: key[8:])[:most])
    return {key: text for key, text in texts.items() if key in kept}


def _documents(sources: Iterable[str], text_field: str):
    for source in sources:
        kind = corpus.kind(source, text_field)
        if kind != "text":
            raise UserError(f"data source {source} is {kind}: a tokenizer is trained on text")
        yield from corpus.documents(source, text_field)
