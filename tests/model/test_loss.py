"""The chunked loss against torch's cross-entropy over whole logits, in fp64."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from megaarch.model import linear, loss
from megaarch.model.loss import cross_entropy

R, D, V, PADDED = 300, 8, 100, 128


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((R, D), (PADDED, D), (PADDED,))
    )
    target = torch.randint(0, V, (R,), generator=g)
    upstream = torch.randn(2, R, generator=g, dtype=torch.float64)
    return hidden, weight, bias, target, upstream


def plain(hidden, weight, bias, target):
    logits = (hidden @ weight.T + (0 if bias is None else bias))[:, :V]
    return F.cross_entropy(logits, target, reduction="none"), logits.logsumexp(-1)


def gradients(losses, inputs, upstream):
    return torch.autograd.grad(losses, inputs, list(upstream))


@pytest.mark.parametrize("kept_bytes", [0, 150_000, 1 << 30])  # none, some, all chunks
@pytest.mark.parametrize("chunk_rows", [1, 128, 299, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_plain_cross_entropy(problem, monkeypatch, kept_bytes, chunk_rows, with_bias):
    monkeypatch.setattr(loss, "CPU", loss.CPU._replace(kept=kept_bytes))
    hidden, weight, bias, target, upstream = problem
    bias = bias if with_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    ours = cross_entropy(hidden, weight, bias, target, vocabulary_size=V, chunk_rows=chunk_rows)
    expected = plain(hidden, weight, bias, target)
    torch.testing.assert_close(ours.nll, expected[0])
    torch.testing.assert_close(ours.log_partition, expected[1])
    assert ours.text_nll is None
    # Upstream gradients differ for each target, as weights and z-loss make them.
    for a, b in zip(
        gradients(ours[:2], inputs, upstream), gradients(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_z_loss(problem):
    hidden, weight, bias, target, upstream = problem

    def total(nll, log_partition):
        return (upstream[0] * (nll + 1e-2 * log_partition**2)).sum()

    ours = total(*cross_entropy(hidden, weight, bias, target, vocabulary_size=V)[:2])
    expected = total(*plain(hidden, weight, bias, target))
    for a, b in zip(*(torch.autograd.grad(x, problem[:3]) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_padded_ids_have_no_gradient(problem):
    hidden, weight, bias, target, upstream = problem
    ours = cross_entropy(hidden, weight, bias, target, vocabulary_size=V)
    _, grad, grad_bias = gradients(ours[:2], [hidden, weight, bias], upstream)
    assert not grad[V:].any() and not grad_bias[V:].any() and grad[:V].any(1).all()


def test_a_chunk_finds_one_table_of_gradients_and_no_other(problem, monkeypatch):
    """A table in fp32 is gigabytes: the sum of those before is there, the last one's summand is not."""
    hidden, weight, bias, target, upstream = problem
    made, found = [], []

    def product(a, b):
        found.append(sum(summand() is not None for summand in made))
        of_chunk = linear.transposed_product(a, b)
        made.append(weakref.ref(of_chunk))
        return of_chunk

    monkeypatch.setattr(loss, "transposed_product", product)
    ours = cross_entropy(hidden, weight, bias, target, vocabulary_size=V, chunk_rows=128)
    gradients(ours[:2], [hidden, weight, bias], upstream)
    assert found == [0, 1, 1]


def test_backward_twice_gives_the_same(problem):
    hidden, weight, bias, target, upstream = problem
    ours = cross_entropy(hidden, weight, bias, target, vocabulary_size=V)
    first, second = (
        torch.autograd.grad(ours[:2], [hidden, weight], list(upstream), retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_text_renormalization(problem):
    hidden, weight, bias, target, _ = problem
    text = torch.arange(V) % 3 != 0
    target = torch.where(text[target], target, target + 1) % V
    ours = cross_entropy(hidden, weight, bias, target, vocabulary_size=V, text_tokens=text)
    p = torch.softmax((hidden @ weight.T + bias)[:, :V], -1) * text
    expected = -(p / p.sum(-1, keepdim=True)).gather(1, target[:, None])[:, 0].log()
    kept = text[target]
    assert kept.sum() > 200
    torch.testing.assert_close(ours.text_nll[kept], expected[kept])
    assert (ours.text_nll < ours.nll).all()


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize("with_bias", [True, False])
def test_half_precision(problem, monkeypatch, kept_bytes, with_bias):
    """Hidden states in bf16 under fp32 masters, whichever dtype the chunks stay in."""
    monkeypatch.setattr(loss, "CPU", loss.CPU._replace(kept=kept_bytes))
    hidden, weight, bias, target, upstream = (
        x.detach().float() if x.is_floating_point() else x for x in problem
    )
    inputs = [
        x.requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))
    ]
    text = torch.arange(V) % 2 == 0
    rest = [*inputs[1:], *([] if with_bias else [None])]
    ours = cross_entropy(hidden.bfloat16(), *rest, target, vocabulary_size=V, text_tokens=text)
    assert all(x.dtype == torch.float32 for x in ours)
    expected = plain(*inputs, *([] if with_bias else [None]), target)
    torch.testing.assert_close(ours.nll, expected[0], atol=0.1, rtol=0.02)
    logits = (hidden @ weight.T + (bias if with_bias else 0))[:, :V]
    of_text = logits[:, text].logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(ours.text_nll, of_text, atol=0.1, rtol=0.02)
    for a, b in zip(
        gradients(ours[:2], inputs, upstream), gradients(expected, inputs, upstream), strict=True
    ):
        assert a.dtype == torch.float32 and a.is_contiguous()
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("slope", [None, loss.torch_slope], ids=["default", "torch"])
@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
def test_many_chunks_are_as_exact_as_one(slope, masters):
    """The gradient of the output layer sums its chunks in fp32, also where FSDP has gathered the
    layer in bf16: 128 chunks are no farther off fp64 than one is, but for the rounding of each chunk's
    product by a CPU's units for bf16, which adds no more than the last rounding: the root of 2."""
    g = torch.Generator().manual_seed(0)
    rows, width, ids = 1024, 64, 256
    hidden = torch.randn(rows, width, generator=g).bfloat16()
    weight = torch.randn(ids, width, generator=g).bfloat16() / 8
    target = torch.randint(0, ids, (rows,), generator=g)

    def gradient(hidden, weight, **options):
        weight = weight.clone().requires_grad_()
        found = cross_entropy(hidden, weight, None, target, vocabulary_size=ids, **options)
        return torch.autograd.grad(found.nll.mean(), weight)[0].double()

    exact = gradient(hidden.double(), weight.double())
    errors = [
        float((gradient(hidden, weight.to(masters), chunk_rows=n, slope=slope) - exact).norm())
        for n in (8, rows)
    ]
    rounds_chunks = linear.CPU_HAS_UNITS and masters == torch.bfloat16
    assert (
        errors[0] < (1.5 if rounds_chunks else 1.2) * errors[1] and errors[1] < 5e-3 * exact.norm()
    )


def test_training_loss_weighs_targets_and_squares_the_partition():
    g = torch.Generator().manual_seed(0)
    nll, partition, weights = torch.rand(3, 2, 5, generator=g, dtype=torch.float64)
    found = loss.training_loss(loss.TargetLosses(nll, partition), weights, 1e-2)
    plain = sum(float(n * w) for n, w in zip(nll.flatten(), weights.flatten(), strict=True))
    square = sum(
        float(p**2 * w) for p, w in zip(partition.flatten(), weights.flatten(), strict=True)
    )
    assert [float(x) for x in found] == pytest.approx([plain, plain + 1e-2 * square], rel=1e-12)


def test_no_row(problem):
    hidden, weight, bias, target, _ = problem
    ours = cross_entropy(hidden[:0], weight, bias, target[:0], vocabulary_size=V)
    (ours.nll.sum() + ours.log_partition.sum()).backward()
    assert ours.nll.shape == (0,) and not weight.grad.any()
