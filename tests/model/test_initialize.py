import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaarch.model import Transformer, initialize
from megaarch.model.initialize import initial_value
from tests.model.conftest import tiny


@pytest.fixture
def settings():
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


T5X = {
    "hidden_size": 512,
    "feed_forward_size": 384,
    "heads": 128,
    "head_size": 4,
    "relative_buckets": 256,
    "relative_max_distance": 512,
    "vocabulary_size": 1024,
    "position_encoding": "relative",
    "initializer": "t5x",
}


def of_t5x(name, value, settings):
    """(values, deviation, a bound of what was cut off or None) of each kernel of a parameter, as the
    layers of t5x/examples/t5 say: their `variance_scaling` scales by fan-in, or by the mean of both."""
    size, keys = settings.head_size, settings.kv_heads or settings.heads
    width, inner = settings.hidden_size, settings.heads * size
    normal, cut = (
        (lambda fan: (fan**-0.5, None)),
        (lambda fan: (fan**-0.5, 2 / 0.87962566103423978)),
    )
    if name == "embedding.weight":
        yield value, 1.0, None
    elif name.startswith("relative_bias"):
        yield value, ((256 + 128) / 2) ** -0.5, 3**0.5
    elif name.endswith("attention.qkv.weight"):
        heads = value.view(keys, -1, size, width)
        yield heads[:, :-2], (width * size) ** -0.5, None
        yield heads[:, -2], *normal(width)
        yield heads[:, -1], *normal(width)
    elif name.endswith("cross_attention.q.weight"):
        yield value, (width * size) ** -0.5, None
    elif name.endswith("cross_attention.kv.weight"):
        yield from ((part, *normal(width)) for part in value.view(keys, 2, size, width).unbind(1))
    elif name.endswith("attention.output.weight"):
        yield value, *normal(inner)
    elif name.endswith("gate_up.weight"):
        yield from ((part, *cut(width)) for part in value.view(-1, 2, width).unbind(1))
    elif name.endswith("down.weight"):
        yield value, *cut(settings.feed_forward_size)
    else:
        assert name == "output.weight", name
        yield value, *cut(width)


@pytest.mark.parametrize(
    "given",
    [{"architecture": "encoder_decoder"}, {"kv_heads": 32, "tied_embedding": False}],
    ids=["encoder-decoder", "decoder, grouped keys, untied"],
)
def test_t5x_deviations_are_the_sources(given):
    settings = tiny(**T5X | given, activation="geglu")
    model = Transformer(settings)
    initialize(model, 2)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
            continue
        for values, deviation, bound in of_t5x(name, p.detach(), settings):
            assert abs(float(values.std()) / deviation - 1) < 0.01, name
            assert abs(float(values.mean())) < 0.02 * deviation, name
            largest = float(values.abs().max()) / deviation
            assert (bound is None and largest > 3.5) or (
                bound and 0.98 * bound < largest <= bound
            ), name


def test_t5x_scores_and_tied_logits_begin_at_deviation_1(make_batch):
    settings = tiny(**T5X)
    model = Transformer(settings)
    initialize(model, 0)
    with torch.no_grad():
        logits = model.logits(make_batch(rows=8))
        x = torch.nn.functional.rms_norm(torch.randn(64, 512), (512,))
        q, k, _ = model.layers["0"].attention.qkv(x).unflatten(-1, (128, 3, 4)).unbind(-2)
        scores = torch.einsum("qhd,khd->hqk", q, k) * model.layers["0"].attention.options["scale"]
    assert float(logits.std()) == pytest.approx(1, abs=0.1)
    assert float(scores.std()) == pytest.approx(1, abs=0.1)


def test_t5x_takes_its_scales_along_unless_they_are_given():
    found = tiny(initializer="t5x", hidden_size=64)
    assert (found.attention_scale, found.output_scale) == (1.0, 0.125)
    assert tiny(initializer="t5x", tied_embedding=False).output_scale is None
    own = tiny(initializer="t5x", attention_scale=0.5, output_scale=None)
    assert (own.attention_scale, own.output_scale) == (0.5, None)
    assert tiny(**found.model_dump()) == found


def whole_draw(name, shape, model, seed, block):
    """The definition: consecutive blocks of the flattened parameter, one generator each."""
    elements, drawn = math.prod(shape), []
    for number, start in enumerate(range(0, elements, block)):
        text = f"{seed} {name}" + (f" {number}" if number else "")
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn.append(torch.randn(min(block, elements - start), generator=generator))
    return torch.cat(drawn).view(shape) * model.initial_deviation


@given(data=st.data())
def test_a_shard_is_a_slice_of_the_whole_draw(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="shape"))
    block = data.draw(st.integers(1, 300), label="block")
    starts = [data.draw(st.integers(0, size)) for size in shape]
    stops = [data.draw(st.integers(start, size)) for start, size in zip(starts, shape)]
    shard = tuple(map(range, starts, stops))
    model = tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(initial_value.__globals__, "BLOCK", block)
        found = initial_value("embedding.weight", shape, model, 7, shard)
        whole = initial_value("embedding.weight", shape, model, 7)
    wanted = whole_draw("embedding.weight", shape, model, 7, block)
    assert torch.equal(whole, wanted)
    assert torch.equal(found, wanted[tuple(map(slice, starts, stops))])


@given(data=st.data())
def test_a_t5x_shard_is_a_slice_of_the_whole(data):
    settings = tiny(**T5X, kv_heads=64)
    names = (
        "relative_bias.decoder",
        "layers.0.attention.qkv.weight",
        "layers.1.feed_forward.up.weight",
    )
    name = data.draw(st.sampled_from(names))
    shape = (40, 16)
    starts = [data.draw(st.integers(0, size)) for size in shape]
    stops = [data.draw(st.integers(start, size)) for start, size in zip(starts, shape)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(initial_value.__globals__, "BLOCK", data.draw(st.integers(30, 300)))
        found = initial_value(name, shape, settings, 7, tuple(map(range, starts, stops)))
        whole = initial_value(name, shape, settings, 7)
    assert torch.equal(found, whole[tuple(map(slice, starts, stops))])


@pytest.mark.parametrize(
    "shard, most",
    [
        ((range(192, 256), range(4096)), 1),  # of FSDP: rows
        ((range(4096), range(512, 1024)), 16),  # of tensor parallelism's row-wise layers: columns
        ((range(1024, 1536), range(512, 1024)), 2),  # of both
        ((range(300, 300), range(4096)), 0),
    ],
)
def test_only_the_blocks_of_a_shard_are_drawn_each_once(shard, most, settings, monkeypatch):
    drawn, honest = [], torch.randn

    def randn(size, generator):
        drawn.append(size)
        return honest(size, generator=generator)

    monkeypatch.setattr(torch, "randn", randn)
    found = initial_value("output.weight", (4096, 4096), settings, 0, shard)
    assert found.shape == tuple(map(len, shard))
    assert len(drawn) == most
