"""T5's relative attention bias against the published implementation."""

import pytest
import torch

from megaarch.attention import bias as bias_module
from megaarch.attention.bias import RelativeBias, add_up, multiply_out, relative_bucket


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


def indexed(table, bucket_GQK):
    """[G, H, Q, K] by autograd's own indexing."""
    return table[bucket_GQK].permute(0, 3, 1, 2)


@pytest.mark.parametrize("chunk", [1, 96, 1 << 26])  # less than a bucket's row, a ragged split, all
@pytest.mark.parametrize("total", [add_up, multiply_out])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_by_bucket_are_the_tables_gradient(total, dtype, chunk, monkeypatch):
    monkeypatch.setattr(bias_module, "CHUNK", chunk)
    table = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    bucket = torch.randint(0, 7, (2, 5, 11))  # the last of eight is never met
    grad = torch.randn(2, 3, 5, 11).to(dtype)
    (expected,) = torch.autograd.grad(indexed(table, bucket), table, grad.double())
    found = total(grad.flatten(2), bucket.flatten(1), 8)
    assert found.dtype == dtype and found.shape == (3, 8)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double().t(), expected, rtol=tolerance, atol=tolerance)


def test_chunks_of_gradients_in_bf16_are_added_in_fp32(monkeypatch):
    """4096 times 1/256 in one bucket: sums in bf16 end at 1, where one more is rounded away."""
    monkeypatch.setattr(bias_module, "CHUNK", 4)
    grad = torch.full((1, 1, 4096), 1 / 256, dtype=torch.bfloat16)
    assert multiply_out(grad, torch.zeros(1, 4096, dtype=torch.int64), 4)[0, 0] == 16


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_gradient_of_the_block(on_a_gpu, monkeypatch):
    if on_a_gpu:
        monkeypatch.setattr(bias_module, "add_up", multiply_out)
    table = torch.randn(32, 4, dtype=torch.float64, requires_grad=True)
    queries = torch.randint(0, 300, (2, 40))
    keys = torch.randint(0, 300, (2, 50))
    block = RelativeBias(table, True).block(queries, keys)
    bucket = relative_bucket(keys[:, None] - queries[:, :, None], True, 32, 128)
    expected = indexed(table, bucket)
    torch.testing.assert_close(block, expected, rtol=0, atol=0)
    grad = torch.randn_like(block)
    gradients = [torch.autograd.grad(x, table, grad)[0] for x in (block, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_no_accelerator_adds_by_atomics(monkeypatch):
    """The gradient of a block that is not on a CPU is a product."""
    used = []
    monkeypatch.setattr(bias_module, "add_up", lambda *given: used.append("add_up"))

    def product(grad_GHN, bucket_GN, buckets):
        used.append("product")
        return grad_GHN.new_zeros(grad_GHN.shape[1], buckets)

    monkeypatch.setattr(bias_module, "multiply_out", product)
    table = torch.zeros(32, 4, device="meta", requires_grad=True)
    positions = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    RelativeBias(table, True).block(positions, positions).sum().backward()
    assert used == ["product"]


def test_buckets_without_a_logarithmic_half_are_refused():
    with pytest.raises(ValueError, match="2 buckets cannot reach 128"):
        RelativeBias(torch.zeros(2, 4), bidirectional=True)
    with pytest.raises(ValueError, match="32 buckets cannot reach 16"):
        RelativeBias(torch.zeros(32, 4), bidirectional=False, max_distance=16)
