"""Packing: examples stay isolated, nothing is lost, and what does not fit is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaarch.attention.mask import causal, full
from megaarch.data.example import Converted, ConvertedStream, RowShape
from megaarch.data.packing import pack, plan_rows


def two_stacks(n, m, first):
    """An encoder-decoder example of n inputs and m targets, tokens numbered from `first`."""

    def stream(length, parts, cross=()):
        tokens = np.arange(first, first + length)
        return ConvertedStream(tokens, np.arange(length)[:, None], list(parts), list(cross))

    return Converted(
        (stream(n, [full(0, n, 0, n)]), stream(m, [causal(0, m, 0, m)], [full(0, m, 0, n)])),
        np.arange(m),
        np.arange(first, first + m),
        np.ones(m, dtype=np.float32),
    )


LIMIT = RowShape((20, 12), 12, 4, 4)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12))
def test_packed_rows_hold_every_example_in_a_block_of_its_own(sizes):
    examples = [two_stacks(n, m, 100 * (i + 1)) for i, (n, m) in enumerate(sizes)]
    planned = list(plan_rows([e.shape for e in examples], LIMIT))
    assert [i for row in planned for i in row] == list(range(len(examples)))
    rows = [[examples[i] for i in row] for row in planned]
    batch = pack(rows, LIMIT, pad=7, axes=1, sample_index=range(len(rows)))
    assert batch.counts.tokens == tuple(sum(x) for x in zip(*sizes, strict=True))
    assert batch.counts.targets == sum(m for _, m in sizes)
    encoder, decoder = batch.streams
    owner_e = (encoder.tokens // 100).numpy() * (encoder.tokens != 7).numpy()
    owner_d = (decoder.tokens // 100).numpy() * (decoder.tokens != 7).numpy()
    same = (owner_e[:, :, None] == owner_e[:, None, :]) & (owner_e[:, :, None] > 0)
    assert (encoder.parts.dense() == same).all()
    crossed = (owner_d[:, :, None] == owner_e[:, None, :]) & (owner_d[:, :, None] > 0)
    assert (decoder.cross.dense() == crossed).all()
    within = np.tril(np.ones((12, 12), bool))
    own = (owner_d[:, :, None] == owner_d[:, None, :]) & (owner_d[:, :, None] > 0)
    assert (decoder.parts.dense() == (own & within)).all()
    # each target is read off at the row that holds its own token here
    weight = batch.target_weights.bool()
    read = decoder.tokens.gather(1, batch.target_index)
    assert (read[weight] == batch.target_tokens[weight]).all()
    assert batch.head_rows[: batch.head_count].tolist() == weight.flatten().nonzero()[:, 0].tolist()
    assert len(batch.head_rows) % 128 == 0


def test_positions_restart_and_the_shape_is_fixed():
    batch = pack(
        [[two_stacks(3, 2, 100), two_stacks(4, 2, 200)]], LIMIT, pad=0, axes=1, sample_index=[5]
    )
    assert batch.streams[0].positions[0, :8, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert batch.streams[0].tokens.shape == (1, 20)
    assert batch.target_tokens.shape == (1, 12)
    assert batch.streams[0].parts.table.shape == (1, 4, 5)
    assert batch.sample_index.tolist() == [5]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="room for 20"):
        pack([[two_stacks(15, 2, 1), two_stacks(6, 2, 1)]], LIMIT, pad=0, axes=1, sample_index=[0])
    with pytest.raises(ValueError, match="parts and room for 1"):
        tight = RowShape((20, 12), 12, 1, 1)
        pack([[two_stacks(2, 2, 1), two_stacks(2, 2, 1)]], tight, pad=0, axes=1, sample_index=[0])
