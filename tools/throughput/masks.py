"""The mask types of the attention benchmark, by name: (rows, length, generator) -> Parts.

Legend: n tokens of a row, p prefix, c context.
"""

import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from megaarch.attention.mask import Parts, causal, full

Row = list[tuple[int, ...]]


def prefix(p: int, n: int, start: int = 0) -> Row:
    """R[0:p; 0:p] + C[p:n; 0:n], moved to `start`."""
    end = start + n
    row = [full(start, start + p, start, start + p)] if p else []
    return row + ([causal(start + p, end, start, end)] if p < n else [])


def documents(n: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(start, end) of documents that fill a row: lengths log-uniform from 64 to n / 2."""
    start = 0
    while start < n:
        length = int(np.exp(rng.uniform(np.log(min(64, n)), np.log(max(n // 2, 65)))))
        yield start, min(start + length, n)
        start += length


def turns(n: int, rng: np.random.Generator) -> Row:
    """R[turn; 0:its end]: 8 turns of random lengths."""
    edges = np.sort(rng.choice(np.arange(1, n), size=min(7, n - 1), replace=False))
    edges = [0, *edges.tolist(), n]
    return [full(a, b, 0, b) for a, b in pairwise(edges)]


def two_stream(n: int, rng: np.random.Generator) -> Row:
    """XLNet's [content; query]: a sixth of the tokens are targets (Yang et al. 2019)."""
    content = n * 6 // 7
    targets = n - content
    c = content - targets
    return [full(0, c, 0, c), causal(c, content, 0, content), causal(content, n, 0, content - 1)]


def packed_prefix(n: int, rng: np.random.Generator) -> Row:
    row: Row = []
    for a, b in documents(n, rng):
        row += prefix(int(rng.integers(0, b - a + 1)), b - a, a)
    return row


Draw = Callable[[int, np.random.Generator], Row]
MASKS: dict[str, Draw] = {
    "causal": lambda n, rng: [causal(0, n, 0, n)],
    "full": lambda n, rng: [full(0, n, 0, n)],
    "prefix_eighth": lambda n, rng: prefix(n // 8, n),
    "prefix_quarter": lambda n, rng: prefix(n // 4, n),
    "prefix_half": lambda n, rng: prefix(n // 2, n),
    "prefix_random": lambda n, rng: prefix(int(rng.integers(0, n)), n),
    "packed_causal": lambda n, rng: [causal(a, b, a, b) for a, b in documents(n, rng)],
    "packed_prefix": packed_prefix,
    "cross": lambda n, rng: [full(0, n // 4, 0, n)],
    "two_stream": two_stream,
    "turns": turns,
}
DRAWN = ("prefix_random", "packed_causal", "packed_prefix", "turns")  # other lengths in each batch


def draw(name: str, rows: int, n: int, rng: np.random.Generator) -> Parts:
    """The parts of a batch: every row draws its own."""
    queries = n // 4 if name == "cross" else n
    return Parts.of([MASKS[name](n, rng) for _ in range(rows)], queries, n)


def batch(name: str, rows: int, n: int, seed: int, number: int) -> Parts:
    """Batch `number` of a mask: the same for every kernel and in every run."""
    key = (seed, zlib.crc32(name.encode()), n, number)
    return draw(name, rows, n, np.random.default_rng(key))
