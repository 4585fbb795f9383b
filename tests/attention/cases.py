"""Adversarial masks: name -> (one list of parts for each batch row, queries, keys)."""

from itertools import pairwise

import numpy as np

from megaarch.attention.mask import causal, full


def prefix(p, n, start=0):
    """R[0:p; 0:p] + C[p:n; 0:n], as prefix decoders have it."""
    parts = [full(start, start + p, start, start + p)] if p else []
    return parts + ([causal(start + p, start + n, start, start + n)] if p < n else [])


def spans(lengths):
    """(start, end) of examples of these lengths, one behind the other."""
    return list(pairwise([0, *np.cumsum(lengths).tolist()]))


def chat(*ends):
    """R[turn t; 0:end of t]."""
    return [full(a, b, 0, b) for a, b in pairwise((0, *ends))]


def two_stream(c, n):
    """XLNet's row [n content; m query], tokens in factorization order, c of them context."""
    content = [full(0, c, 0, c)] if c else []
    return [*content, causal(c, n, 0, n), causal(n, n + n - c, 0, n - 1)]


def random_lengths(seed, total, low, high):
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) + high <= total:
        lengths.append(int(rng.integers(low, high + 1)))
    return lengths


CASES = {
    "encoder": ([[full(0, 12, 0, 12)]] * 3, 12, 12),
    "causal": ([[causal(0, 13, 0, 13)]] * 3, 13, 13),
    "one row": ([prefix(5, 11)], 11, 11),
    "one token": ([[causal(0, 1, 0, 1)], [full(0, 1, 0, 1)]], 1, 1),
    "equal prefixes": ([prefix(4, 12)] * 4, 12, 12),
    "prefix of each row": ([prefix(p, 16) for p in (0, 1, 7, 15, 16)], 16, 16),
    "prefix of each row, padded": ([prefix(p, n) for p, n in ((0, 9), (3, 14), (9, 9))], 15, 15),
    "padding inside and at the ends": (
        [[causal(2, 6, 2, 6), full(9, 12, 9, 12)], [], [full(1, 2, 1, 2), causal(11, 13, 11, 13)]],
        14,
        14,
    ),
    "rows that see no key": (
        [[causal(0, 6, 0, 3), full(6, 9, 4, 4)], [causal(2, 9, 0, 1)], [causal(0, 9, 3, 3)]],
        9,
        9,
    ),
    "no part at all": ([[], []], 5, 5),
    "packed causal": (
        [[causal(a, b, a, b) for a, b in spans(random_lengths(s, 40, 1, 9))] for s in range(3)],
        40,
        40,
    ),
    "packed one-token examples": ([[causal(i, i + 1, i, i + 1) for i in range(6)]] * 2, 6, 6),
    "packed prefixes": (
        [
            [
                part
                for a, b in spans(random_lengths(s, 36, 2, 10))
                for part in prefix((b - a + s) // 2, b - a, start=a)
            ]
            for s in range(3)
        ],
        36,
        36,
    ),
    "cross": ([[full(0, 5, 0, 11)], [full(0, 7, 0, 3)], [full(1, 6, 4, 5)]], 7, 11),
    "packed cross": (
        [
            [full(0, 2, 0, 5), full(2, 6, 5, 6), full(6, 8, 6, 11)],
            [full(0, 7, 3, 11), full(7, 8, 0, 3)],
        ],
        8,
        11,
    ),
    "chat": ([chat(3, 4, 9, 13), chat(13), chat(1, 2, 10)], 13, 13),
    "two streams": ([two_stream(0, 8), two_stream(4, 8), two_stream(7, 8)], 16, 16),
    "key-value cache": ([[causal(0, 3, 0, 12)], [causal(0, 3, 2, 9)], [full(0, 1, 0, 4)]], 3, 12),
    "one new token": ([[causal(0, 1, 0, n)] for n in (4, 9, 9)], 1, 9),
    # The rows before the suffix are keys, but ask for nothing: no overlay may touch them.
    "keys that do not ask": ([[causal(5, 12, 0, 12)], [causal(3, 9, 1, 9)]], 12, 12),
}
