"""Chunks of the cross-entropy on the CPU against torch in fp64, alone and in the whole loss."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megaarch.kernels import cross_entropy
from megaarch.model import loss
from tests.kernels.problems import REASON, TOLERANCE, losses, off, whole_loss

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 60])
@pytest.mark.parametrize(("rows", "known", "columns"), [(5, 100, 128), (130, 33, 33), (1, 2, 3)])
def test_equals_torch(rows, known, columns, first, dtype):
    for biased in (True, False):
        found = losses(rows, known, columns, dtype, first=first, biased=biased)
        assert found < TOLERANCE[dtype]


def test_a_rank_that_holds_only_padding_adds_nothing():
    target = torch.tensor([-4, 1])
    text = torch.ones(3, dtype=torch.bool)
    logits = torch.randn(2, 3)
    found = cross_entropy.log_sums(logits, None, target, text, 0)
    assert (found == float("-inf")).all()
    ones = torch.ones(2)
    gradient = cross_entropy.gradient(logits, None, target - 9, ones, ones, ones, 0)
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_logits_far_apart_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]])
    found = cross_entropy.log_sums(logits, None, torch.tensor([0, 0]), None, 3)
    assert found.tolist() == [[1e4, 1e4], [1e4, -1e4]]


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bias_of_another_dtype(logits_dtype, bias_dtype):
    logits = torch.randn(3, 40).to(logits_dtype)
    bias, target = torch.randn(40).to(bias_dtype), torch.tensor([0, 7, 39])
    found = cross_entropy.log_sums(logits, bias, target, None, 40)
    wanted = (logits.double() + bias.double()).logsumexp(1)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-5)


def test_not_a_number_reaches_the_loss():
    logits = torch.zeros(2, 4)
    logits[1, 2] = float("nan")
    found = cross_entropy.log_sums(logits, None, torch.tensor([0, 0]), None, 4)[0]
    assert found.isnan().tolist() == [False, True]


@pytest.mark.parametrize("kept_bytes", [0, 200_000, 1 << 30])  # chunks: none, some, all kept
@pytest.mark.parametrize("rows", [300, 0])
def test_whole_loss_equals_one_process_of_torch(monkeypatch, rows, kept_bytes):
    monkeypatch.setattr(loss, "CPU", loss.CPU._replace(kept=kept_bytes))
    found, wanted = (whole_loss(rows, fused) for fused in (True, False))
    assert off(found, wanted) < 1e-13


def test_logits_stay_in_half_precision():
    found, wanted = (whole_loss(300, fused, torch.float32, True) for fused in (True, False))
    assert [x.dtype for x in found] == [x.dtype for x in wanted]
    assert off(found, wanted) < 5e-3


def test_fake_tensors_need_no_kernel():
    with FakeTensorMode():
        found = whole_loss(300, True)
    assert [x.shape for x in found[3:]] == [(300, 16), (384, 16), (384,)]
