"""A vocabulary in which a token's id says what it is, for tests of the data rooms.

Text ids 0..999: a multiple of 10 ends a sentence, an even id starts a word (odd ones continue it).
"""

import numpy as np

from megaarch.data.example import SPECIALS, Vocabulary

TEXT = 1000


def toy_vocabulary(sentinels: int = 300) -> Vocabulary:
    special = {name: TEXT + i for i, name in enumerate(SPECIALS)}
    size = TEXT + len(SPECIALS) + sentinels
    ids = np.arange(size)
    text = ids < TEXT
    return Vocabulary(
        size=size,
        sentinels=sentinels,
        special=special,
        text=text,
        word_start=text & (ids % 2 == 0),
        sentence_end=text & (ids % 10 == 0),
    )


def toy_text(raw: int, seed: int, eos_every: int = 0) -> np.ndarray:
    """Random text tokens; with `eos_every`, about one end of document in so many tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(TEXT, size=raw)
    if eos_every:
        tokens[rng.random(raw) < 1 / eos_every] = TEXT + SPECIALS.index("eos")
    return tokens
