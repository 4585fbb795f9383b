"""Float8 products, emulated on a CPU, against a second account of what each recipe rounds."""

import pytest
import torch

from megaarch.config.schema import Training
from megaarch.model import linear
from megaarch.model.transformer import Transformer
from megaarch.parallel import float8

RECIPES = ("tensorwise", "rowwise")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}  # at most, of a normal number: three and two bits of fraction
TOKENS, INPUTS, OUTPUTS = (3, 40), 48, 32


def make(recipe: str):
    training = Training(precision="bf16", float8=recipe, float8_emulate=True)
    return float8.layer_linear(training, sharded=False)


@pytest.fixture(params=RECIPES)
def case(request):
    """(recipe, what to call the layer with, its weight and bias in fp32)."""
    torch.manual_seed(0)
    x, grad = torch.randn(*TOKENS, INPUTS).bfloat16(), torch.randn(*TOKENS, OUTPUTS).bfloat16()
    x[0] *= 30  # rows of other sizes, which their own scales serve better
    return request.param, x, grad, torch.nn.Linear(INPUTS, OUTPUTS)


def run(layer, x, grad):
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    return [out, *torch.autograd.grad(out, [leaf, *layer.parameters()], grad)]


def of(recipe, masters):
    layer = make(recipe)(INPUTS, OUTPUTS, True)
    layer.load_state_dict(masters.state_dict())
    return layer


def test_a_product_has_float8s_error_and_not_bf16s(case):
    recipe, x, grad, masters = case
    found = run(of(recipe, masters), x, grad)
    half = linear.Linear(INPUTS, OUTPUTS)
    half.load_state_dict(masters.state_dict())
    in_bf16 = run(half, x, grad)
    exact = run(masters.double(), x.double(), grad.double())
    gradients = E5M2 if recipe == "tensorwise" else E4M3
    for i, kind in enumerate((E4M3, gradients, gradients)):  # out, of the input, of the weight
        error, least = (
            float((y[i] - exact[i]).detach().norm() / exact[i].norm()) for y in (found, in_bf16)
        )
        assert 3 * least < error < ROUNDING[E4M3] + ROUNDING[kind], (i, least, error)
    assert [y.dtype for y in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    torch.testing.assert_close(found[3].double(), exact[3], rtol=1e-2, atol=1e-1)


def rounded(tensor, kind, recipe, axis):
    """In fp64: to what float8 holds of it, with one scale, or with one along the axis that is summed."""
    tensor = tensor.double()
    largest = tensor.abs().max() if recipe == "tensorwise" else tensor.abs().amax(axis, True)
    scale = torch.finfo(kind).max / largest
    if recipe == "rowwise":
        scale = 2 ** scale.log2().floor()
    return (tensor * scale).float().to(kind).double() / scale


def test_a_product_is_of_rounded_factors(case):
    """Which scale each of the six factors has, and what it is rounded to."""
    recipe, x, grad, masters = case
    found = run(of(recipe, masters), x, grad)
    kind = E5M2 if recipe == "tensorwise" else E4M3
    weight, rows, slopes = masters.weight.detach(), x.flatten(0, 1), grad.flatten(0, 1)
    if recipe == "rowwise":
        weight = weight.bfloat16()
    wanted = [
        rounded(rows, E4M3, recipe, 1) @ rounded(weight, E4M3, recipe, 1).t()
        + masters.bias.double(),
        rounded(slopes, kind, recipe, 1) @ rounded(weight, E4M3, recipe, 0),
        rounded(slopes, kind, recipe, 0).t() @ rounded(rows, E4M3, recipe, 0),
    ]
    for y, exact in zip(found, wanted):
        error = (y.double().reshape(exact.shape) - exact).norm() / exact.norm()
        assert error < 4e-3  # of one rounding to bf16, two with a bias


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_alone_are_float8(tiny, recipe):
    """Embeddings, BERT's transform and the output stay as they are; so do the names."""
    options = {"head_transform": True, "tied_embedding": False}
    given = tiny(architecture="encoder_decoder", **options)
    model = Transformer(given, layer_linear=make(recipe))
    kinds = {
        name: type(m).__name__
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    for name, kind in kinds.items():
        assert kind == ("Float8Linear" if name.startswith("layers.") else "Linear"), name
    assert {name for name in kinds if not name.startswith("layers.")} == {
        "output",
        "head_transform.dense",
    }
    plain = {name: (p.shape, p.dtype) for name, p in Transformer(given).named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == plain
