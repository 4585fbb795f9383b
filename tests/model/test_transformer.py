import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megaarch.model import Transformer, initialize

pytestmark = pytest.mark.slow

ENCODER_DECODER = {"architecture": "encoder_decoder", "encoder_layers": 1, "decoder_layers": 1}


def build(settings, axes=1):
    model = Transformer(settings, position_axes=axes)
    initialize(model, 0)
    return model


CASES = {
    "backbone": ({}, {}),
    "grouped keys": ({"kv_heads": 2, "tied_embedding": False}, {}),
    "two axes": ({"architecture": "prefix_decoder"}, {"axes": 2}),
    "learned, two axes": ({"position_encoding": "learned"}, {"axes": 2}),
    "encoder-decoder": (ENCODER_DECODER, {"lengths": (12, 9)}),
    "post-norm": (
        {"normalization_position": "post", "normalization": "layernorm", "bias": True},
        {"lengths": (12,)},
    ),
    "head transform": ({"head_transform": True, "output_bias": True, "activation": "gelu"}, {}),
    "no target unused": ({"output_scale": 0.5}, {"unused": 0}),
}


@pytest.fixture(params=CASES)
def case(request, tiny, make_batch):
    options, shape = CASES[request.param]
    return build(tiny(**options), shape.get("axes", 1)), make_batch(**shape)


def test_losses_are_the_cross_entropy_of_the_logits(case):
    model, batch = case
    logits = model.logits(batch)
    assert logits.shape[-1] == 150  # the padding of the vocabulary is not shown
    rows = batch.target_index[..., None].expand(-1, -1, 150)
    at_targets = logits.gather(1, rows)
    expected = F.cross_entropy(
        at_targets.flatten(0, 1), batch.target_tokens.flatten(), reduction="none"
    ).view_as(batch.target_weights)
    losses = model(batch)
    torch.testing.assert_close(losses.nll, expected * batch.target_weights)
    torch.testing.assert_close(
        losses.log_partition, at_targets.logsumexp(-1) * batch.target_weights
    )


def test_every_parameter_has_a_gradient(case):
    model, batch = case
    model(batch).nll.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_stages_compose_to_the_whole(case):
    model, batch = case
    out = ()
    for layer in range(
        model.stacks[-1].layers.stop
    ):  # one stage a layer, each with its own context
        out = model(batch, None, range(layer, layer + 1), out)
    losses = out
    assert torch.equal(losses.nll, model(batch).nll)


def test_the_head_runs_at_target_rows_only(tiny, make_batch):
    model, batch = build(tiny()), make_batch(rows=3, targets=7, unused=2)
    assert batch.head_count == 15 and len(batch.head_rows) == 128
    seen = []
    model.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    hidden = model.hidden(batch).detach().requires_grad_()
    losses = model.head(hidden, batch, text_tokens=torch.ones(150, dtype=torch.bool))
    assert seen == [(128, 16)]
    for loss in losses:
        assert (loss != 0).equal(batch.target_weights != 0)
    torch.testing.assert_close(losses.text_nll, losses.nll)
    losses.nll.sum().backward()
    used = torch.zeros(3, 12, dtype=torch.bool)
    used.scatter_(1, batch.target_index[:, :5], True)
    assert hidden.grad.any(-1).equal(used)


def test_bf16_stream_under_fp32_masters(case):
    model, batch = case
    wanted = model(batch).nll
    model.compute_dtype = torch.bfloat16
    assert model.hidden(batch).dtype == torch.bfloat16
    losses = model(batch)
    losses.nll.sum().backward()
    assert losses.nll.dtype == torch.float32
    torch.testing.assert_close(losses.nll, wanted, atol=0.5, rtol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_encoder_reaches_the_decoder_through_its_parts_only(tiny, make_batch):
    model, batch = build(tiny(**ENCODER_DECODER)), make_batch(lengths=(12, 9))
    source, target = batch.streams
    cross = target.cross.table.copy()
    cross[0, 0, 4] = 6  # row 0 of the batch sees the first six rows of the memory
    narrow = dataclasses.replace(target, cross=dataclasses.replace(target.cross, table=cross))
    (hidden,) = model.run(batch, model.stacks[0].layers)
    memory = model.to_memory(hidden).detach().requires_grad_()
    batch = dataclasses.replace(batch, streams=(source, narrow))
    context, layers = model.context(1, batch), model.stacks[1].layers
    out = model.run_layers(model.embed(1, batch), context, layers, memory)
    out.square().sum().backward()
    assert memory.grad[0, :6].any(-1).all() and not memory.grad[0, 6:].any()
    assert memory.grad[1].any(-1).all()


def test_causal_and_prefix_decoders_read_a_relative_table_alike(tiny, make_batch):
    """So under the same mask the same weights give the same logits: what is left is the mask."""
    options = {"position_encoding": "relative", "relative_buckets": 8, "relative_max_distance": 9}
    causal, prefix = (
        build(tiny(architecture=name, **options)) for name in ("causal_decoder", "prefix_decoder")
    )
    torch.nn.init.normal_(causal.relative_bias["decoder"])
    prefix.load_state_dict(causal.state_dict())
    batch = make_batch()
    assert torch.equal(prefix.logits(batch), causal.logits(batch))


AHEAD = {  # t5x builds RelativePositionBiases(bidirectional=True) for its encoders only
    "causal_decoder": {"decoder": False},
    "prefix_decoder": {"decoder": False},
    "encoder_decoder": {"encoder": True, "decoder": False},
    "encoder": {"encoder": True},
    "two_stream": {"decoder": True},
}


@pytest.mark.parametrize("architecture", AHEAD)
def test_which_streams_tell_keys_ahead_apart(architecture, tiny, make_batch):
    from transformers.models.t5.modeling_t5 import T5Attention

    options = {"position_encoding": "relative", "relative_buckets": 8, "relative_max_distance": 9}
    model = build(tiny(architecture=architecture, **options))
    batch = make_batch(lengths=(12, 9)[: len(AHEAD[architecture])])
    places = torch.arange(12)[None]
    distance = places[0] - places[0][:, None]  # of a key from a query, [12, 12]
    for index, (stream, ahead) in enumerate(AHEAD[architecture].items()):
        table = torch.nn.init.normal_(model.relative_bias[stream])
        bucket = T5Attention._relative_position_bucket(distance, ahead, 8, 9)
        block = model.context(index, batch).bias.block(places, places)
        assert torch.equal(block[0], table[bucket].permute(2, 0, 1))


def test_names_of_an_encoder_decoder(tiny):
    settings = tiny(
        **ENCODER_DECODER, position_encoding="relative", activation="geglu", tied_embedding=False
    )
    shapes = {name: tuple(p.shape) for name, p in Transformer(settings).named_parameters()}
    assert shapes == {
        "embedding.weight": (256, 16),
        "relative_bias.encoder": (32, 4),
        "relative_bias.decoder": (32, 4),
        "layers.0.attention_norm.weight": (16,),
        "layers.0.attention.qkv.weight": (48, 16),
        "layers.0.attention.output.weight": (16, 16),
        "layers.0.feed_forward_norm.weight": (16,),
        "layers.0.feed_forward.gate_up.weight": (48, 16),
        "layers.0.feed_forward.down.weight": (16, 24),
        "layers.1.attention_norm.weight": (16,),
        "layers.1.attention.qkv.weight": (48, 16),
        "layers.1.attention.output.weight": (16, 16),
        "layers.1.cross_attention_norm.weight": (16,),
        "layers.1.cross_attention.q.weight": (16, 16),
        "layers.1.cross_attention.kv.weight": (32, 16),
        "layers.1.cross_attention.output.weight": (16, 16),
        "layers.1.feed_forward_norm.weight": (16,),
        "layers.1.feed_forward.gate_up.weight": (48, 16),
        "layers.1.feed_forward.down.weight": (16, 24),
        "encoder_norm.weight": (16,),
        "norm.weight": (16,),
        "output.weight": (256, 16),
    }


def test_names_of_the_options(tiny):
    settings = tiny(
        layers=1,
        architecture="encoder",
        position_encoding="learned",
        embedding_normalization=True,
        segments=2,
        head_transform=True,
        output_bias=True,
        final_normalization=False,
    )
    names = {n for n, _ in Transformer(settings).named_parameters() if not n.startswith("layers")}
    assert names == {
        "embedding.weight",
        "segments.weight",
        "positions.encoder.0.weight",
        "embedding_norm.encoder.weight",
        "head_transform.dense.weight",
        "head_transform.norm.weight",
        "output_bias",
    }


def test_wang_2022_parameter_counts(tiny):
    """Wang et al. 2022: 4.8 B decoders, 11.0 B encoder-decoders (DESIGN: 4.762 and 11.003)."""
    sizes = {"layers": 24, "hidden_size": 4096, "heads": 64, "feed_forward_size": 10240}
    sizes |= {"vocabulary_size": 32128, "position_encoding": "relative", "activation": "geglu"}
    for architecture, expected in (("causal_decoder", 4.762e9), ("encoder_decoder", 11.003e9)):
        with torch.device("meta"):
            model = Transformer(tiny(**sizes, architecture=architecture))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=2e-4)
