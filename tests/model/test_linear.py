"""Products on a CPU: the same values as torch's own kernels."""

import pytest
import torch

from megaarch.model import linear

PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")


@pytest.fixture(params=[True, False], ids=["units", "no units"])
def units(request, monkeypatch):
    monkeypatch.setattr(linear, "CPU_HAS_UNITS", request.param)


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
def test_linear_is_torchs(bias, masters):
    """In the input's dtype, with gradients in the parameters'."""
    torch.manual_seed(0)
    ours, theirs = linear.Linear(24, 10, bias=bias), torch.nn.Linear(24, 10, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(2, 5, 24), torch.randn(2, 5, 10).bfloat16()
    ours, theirs, found = ours.to(masters), theirs.bfloat16(), []
    for layer in (ours, theirs):
        leaf = x.bfloat16().requires_grad_()
        out = layer(leaf)
        found.append([out, *torch.autograd.grad(out, [leaf, *layer.parameters()], grad)])
    dtypes = [torch.bfloat16, torch.bfloat16, *(masters for _ in ours.parameters())]
    assert [x.dtype for x in found[0]] == dtypes
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, check_dtype=False)


def test_the_gradient_of_a_master_is_never_rounded():
    """What a GPU runs: 16-bit factors, and the weight's gradient in fp32."""
    torch.manual_seed(0)
    x, grad = torch.randn(3, 40, 24).bfloat16(), torch.randn(3, 40, 10).bfloat16()
    layer = torch.nn.Linear(24, 10)
    leaf = x.clone().requires_grad_()
    out = linear._Linear.apply(leaf, layer.weight, layer.bias)
    found = torch.autograd.grad(out, [leaf, layer.weight, layer.bias], grad)
    assert [y.dtype for y in (out, *found)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    wide = torch.nn.Linear(24, 10).double()
    wide.load_state_dict({n: p.bfloat16() for n, p in layer.state_dict().items()})
    leaf = x.double().requires_grad_()
    exact = torch.autograd.grad(wide(leaf), [leaf, *wide.parameters()], grad.double())
    torch.testing.assert_close(out.double(), wide(leaf), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-5, atol=1e-5)
    rounded = exact[1].bfloat16()
    assert (found[1] - exact[1]).norm() < 2 * (rounded - exact[1]).norm()


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("choice", [True, False], ids=["oneDNN", "torch"])
@pytest.mark.parametrize(
    "rows, inputs, outputs", [(300, 24, 56), (300, 56, 24), (1, 8, 8), (0, 8, 8)]
)
def test_fp32_is_fp32(monkeypatch, choice, rows, inputs, outputs):
    """Layers, and the products that a layer's gradients are, whichever way their factors lie."""
    monkeypatch.setattr(linear, "ONEDNN_IS_FASTER", choice)
    torch.manual_seed(0)
    layer = linear.Linear(inputs, outputs)
    x, grad = torch.randn(rows, inputs, requires_grad=True), torch.randn(rows, outputs)
    wide = torch.nn.Linear(inputs, outputs).double()
    wide.load_state_dict(layer.state_dict())
    found = [torch.autograd.grad(layer(x), [x, *layer.parameters()], grad), layer(x)]
    assert all(x.is_contiguous() for x in found[0])  # a fused optimizer reads them as they lie
    exact = x.detach().double().requires_grad_()
    wanted = [
        torch.autograd.grad(wide(exact), [exact, *wide.parameters()], grad.double()),
        wide(exact),
    ]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)
    for a in (torch.randn(rows, inputs), torch.randn(inputs, rows).t()):
        for b in (torch.randn(inputs, outputs), torch.randn(outputs, inputs).t()):
            exact = (a.double() @ b.double()).float()
            torch.testing.assert_close(linear.linear(a, b.t()), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                linear.transposed_product(a.t(), b), exact, rtol=1e-5, atol=1e-5
            )


def test_a_product_rounds_as_a_unit_does(monkeypatch):
    """Operands of 16 bits, sums of 32, one rounding at the end."""
    monkeypatch.setattr(linear, "CPU_HAS_UNITS", False)
    a, b = torch.randn(6, 50).bfloat16(), torch.randn(50, 4).bfloat16()
    exact = (a.double() @ b.double()).bfloat16()
    found = linear.linear(a, b.t())
    assert found.dtype == torch.bfloat16
    assert (found != exact).float().mean() < 0.05  # a sum may fall on the other side of a tie
    torch.testing.assert_close(found, exact, rtol=8e-3, atol=1e-3)


def test_no_product_is_emulated(monkeypatch):
    """Neither a layer's nor the head's, forward or backward, in bf16 under fp32 masters."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megaarch.model.loss import cross_entropy

    class Products(TorchDispatchMode):
        dtypes = frozenset()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() in PRODUCTS:
                self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(linear, "CPU_HAS_UNITS", False)
    layer, table = linear.Linear(8, 8), torch.randn(128, 8, requires_grad=True)
    with Products() as ran:
        hidden = layer(torch.randn(5, 8).bfloat16())
        losses = cross_entropy(hidden, table, None, torch.arange(5), vocabulary_size=128)
        losses.nll.sum().backward()
    assert ran.dtypes == {torch.float32}
    assert layer.weight.grad.abs().sum() > 0 and table.grad.abs().sum() > 0
