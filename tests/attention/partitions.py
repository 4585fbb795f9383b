"""Random partitions of query rows into parts, for hypothesis."""

from itertools import pairwise

from hypothesis import strategies as st

from megaarch.attention.mask import CAUSAL, FULL


@st.composite
def partitions(draw, rows=None, longest=14):
    """(rows of parts, queries, keys): any parts that the invariant allows, in any order."""
    queries, keys = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    count = rows or draw(st.integers(1, 4))
    return [draw(_row(queries, keys)) for _ in range(count)], queries, keys


@st.composite
def _row(draw, queries, keys):
    edges = sorted(draw(st.sets(st.integers(0, queries), max_size=5)) | {0, queries})
    parts = []
    for q0, q1 in pairwise(edges):
        shape = draw(st.sampled_from((None, FULL, CAUSAL)))
        if shape is None:
            continue
        k0 = draw(st.integers(0, keys))
        parts.append((shape, q0, q1, k0, draw(st.integers(k0, keys))))
    return draw(st.permutations(parts))
