import pytest
import torch

from megaarch.model import Transformer, initialize
from megaarch.model.initialize import initial_value


@pytest.fixture
def settings(tiny):
    return tiny(
        architecture="encoder_decoder",
        encoder_layers=2,
        decoder_layers=3,
        hidden_size=64,
        feed_forward_size=128,
        bias=True,
        normalization="layernorm",
        position_encoding="relative",
        tied_embedding=False,
        initial_deviation=0.02,
    )


def test_reproducible_and_the_same_after_meta(settings):
    a = Transformer(settings)
    with torch.device("meta"):
        b = Transformer(settings)
    b.to_empty(device="cpu")
    initialize(a, 5)
    torch.manual_seed(123)
    initialize(b, 5)
    state = b.state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, state[name]), name
    initialize(b, 6)
    assert not torch.equal(a.embedding.weight, b.embedding.weight)


def test_a_value_depends_on_its_name_and_seed_only(settings):
    model = Transformer(settings)
    initialize(model, 5)
    names = dict(model.named_parameters())
    for name in reversed(names):  # each drawn alone, in another order
        value = initial_value(name, tuple(names[name].shape), settings, 5)
        assert torch.equal(value, names[name]), name
    drawn = [p.flatten()[:8] for n, p in names.items() if p.std() > 0]
    assert len({tuple(d.tolist()) for d in drawn}) == len(drawn)  # no two alike


def test_scales(settings):
    model = Transformer(settings)
    initialize(model, 0)
    for name, p in model.named_parameters():
        kind = name.rsplit(".", 1)
        if kind[-1] == "bias":
            assert (p == 0).all(), name
        elif "norm" in kind[0]:
            assert (p == 1).all(), name
        else:
            layers = 2 if name.startswith(("layers.0.", "layers.1.")) else 3
            residual = kind[0].endswith((".output", ".down"))
            expected = 0.02 / (2 * layers) ** 0.5 if residual else 0.02
            tolerance = 4 * expected / (2 * p.numel()) ** 0.5
            assert abs(p.std() - expected) < tolerance and abs(p.mean()) < tolerance * 1.5, name
