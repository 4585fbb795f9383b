"""T5's relative attention bias against the published implementation."""

import pytest
import torch

from megaarch.attention.bias import RelativeBias, relative_bucket


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "distance"), [(32, 128), (32, 256), (8, 20), (64, 1000), (4, 7)]
)
def test_buckets_are_t5s(bidirectional, buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=buckets, max_distance=distance
    )
    found = relative_bucket(relative, bidirectional, buckets, distance)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_block_looks_up_the_table_by_key_less_query(bidirectional):
    table = torch.randn(8, 3, requires_grad=True)
    bias = RelativeBias(table, bidirectional, max_distance=16)
    queries = torch.tensor([[0, 5, 40], [7, 7, 100]])
    keys = torch.tensor([[3, 0, 90, 41], [0, 200, 6, 7]])
    block = bias.block(queries, keys)
    assert block.shape == (2, 3, 3, 4)
    for g in range(2):
        for i in range(3):
            for j in range(4):
                distance = keys[g, j] - queries[g, i]
                row = relative_bucket(distance, bidirectional, 8, 16)
                assert torch.equal(block[g, :, i, j], table[row])
    (gradient,) = torch.autograd.grad(block.sum(), table)
    assert gradient.sum(0).tolist() == [24.0] * 3
    both_axes = [torch.stack((x, x * 0 - 5), dim=-1) for x in (queries, keys)]
    assert torch.equal(bias.block(*both_axes), block)


def test_buckets_without_a_logarithmic_half_are_refused():
    with pytest.raises(ValueError, match="2 buckets cannot reach 128"):
        RelativeBias(torch.zeros(2, 4), bidirectional=True)
    with pytest.raises(ValueError, match="32 buckets cannot reach 16"):
        RelativeBias(torch.zeros(32, 4), bidirectional=False, max_distance=16)
