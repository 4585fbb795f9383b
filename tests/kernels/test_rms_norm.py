"""RMSNorm on the CPU against torch in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megaarch.kernels.rms_norm import RMSNorm, rms_norm
from tests.kernels.problems import REASON, TOLERANCE, draw, norms

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 7), (600, 33), (2, 4096), (0, 8)], ids=str)
def test_equals_torch(shape, dtype):
    if shape[0]:
        assert norms(shape, dtype) < TOLERANCE[dtype]
    else:
        x, weight = draw(shape, shape[-1:], dtype=dtype)
        grad_x, grad_weight = torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(), (x, weight))
        assert grad_x.shape == shape and not grad_weight.any()


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), draw((2, 3, 5), (5,)))


def test_the_operator_keeps_torchs_contract():
    """Schema, fake tensors, autograd registration and tracing, as torch checks them."""
    checks = torch.library.opcheck(torch.ops.megaarch.rms_norm.default, (*draw((4, 6), (6,)), 1e-6))
    assert set(checks.values()) == {"SUCCESS"}


def test_strided_input_and_gradient():
    x, weight, grad = draw((6, 4, 5), (6,), (5, 4, 6))
    grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    found, wanted = (
        torch.autograd.grad(norm(x.transpose(0, 2)), (x, weight), grad)
        for norm in (
            lambda y: rms_norm(y, weight, 1e-6),
            lambda y: F.rms_norm(y, (6,), weight, 1e-6),
        )
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_result_has_the_dtype_of_torchs(x_dtype):
    x, weight = draw((4, 6), (6,), dtype=torch.float32)
    x = x.to(x_dtype)
    wanted = F.rms_norm(x, (6,), weight, 1e-6)
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)


def test_fake_tensors_need_no_kernel():
    with FakeTensorMode():
        norm = RMSNorm(8, 1e-6, fused=True)
        x = torch.empty(2, 3, 8, requires_grad=True)
        norm(x).sum().backward()
    assert x.grad.shape == (2, 3, 8) and norm.weight.grad.shape == (8,)


def test_compiled_and_recomputed():
    """Neither breaks the graph nor changes what comes out."""
    x, weight = draw((3, 8), (8,))

    def block(x, weight):
        return rms_norm(rms_norm(x, weight, 1e-6).square(), weight, 1e-6).sin()

    wanted = torch.autograd.grad(block(x, weight).sum(), (x, weight))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    again = checkpoint(block, x, weight, use_reentrant=False)
    for out in (compiled(x, weight), again):
        torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, weight)), wanted)


def test_not_a_number_stays_in_its_row():
    x, weight = draw((3, 8), (8,))
    dirty = x.detach().clone()
    dirty[1, 2] = float("nan")
    found = rms_norm(dirty, weight, 1e-6)
    assert found[1].isnan().all() and torch.equal(found[::2], rms_norm(x, weight, 1e-6)[::2])


def test_a_dtype_without_a_kernel_is_named():
    x, weight = draw((3, 8), (8,), dtype=torch.float16)
    with pytest.raises(
        RuntimeError, match=r"rms_norm_forward on cpu: no kernel for this dtype, given"
    ):
        rms_norm(x, weight, 1e-6)
