"""Hugging Face's own models are the oracle: same weights, same logits."""

import pytest
import torch
import transformers
from torch import nn

from megaarch import interchange
from megaarch.attention import parts
from megaarch.attention.parts import Parts
from megaarch.data.batch import Batch, Counts, Stream
from megaarch.model import Transformer

V, N, M, B = 150, 12, 9, 2


def gpt2():
    c = transformers.GPT2Config(
        vocab_size=V, n_positions=20, n_embd=24, n_layer=2, n_head=3, layer_norm_epsilon=1e-3
    )
    return transformers.GPT2LMHeadModel(c)


def llama(**options):
    c = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_theta": 100.0, "rope_type": "default"},
        **options,
    )
    return transformers.LlamaForCausalLM(c)


def bert():
    c = transformers.BertConfig(
        vocab_size=V,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        layer_norm_eps=1e-3,
    )
    return transformers.BertForMaskedLM(c)


def t5(tied: bool, activation: str):
    c = transformers.T5Config(
        vocab_size=V,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        layer_norm_epsilon=1e-3,
        feed_forward_proj=activation,
        tie_word_embeddings=tied,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(c)
    if not tied:  # as in the released v1.1 weights, whatever the library ties
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    return model


def bart():
    c = transformers.BartConfig(
        vocab_size=V,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=20,
    )
    model = transformers.BartForConditionalGeneration(c)
    model.final_logits_bias.normal_()
    return model


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied-biased": lambda: llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "bert": bert,
    "t5-v1.1": lambda: t5(False, "gated-gelu"),
    "t5-v1.0": lambda: t5(True, "relu"),
    "bart": bart,
}


@pytest.fixture(params=MODELS)
def theirs(request):
    torch.manual_seed(1)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # norms and biases too, so that none is trivial
            p.normal_(mean=float("norm" in name.lower() and "weight" in name), std=0.3)
    return model


def stream(tokens, part, cross=None, segments=None):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)[..., None]
    n = tokens.shape[1]
    return Stream(tokens, positions, Parts.of([[part(0, n, 0, n)]] * B, n, n), cross, segments)


def batch(*streams):
    empty = torch.zeros(B, 0, dtype=torch.long)
    counts = Counts(B, (0,), (0,), (0,), 0, (0,))
    return Batch(streams, empty, empty, empty.float(), empty[0], 0, torch.arange(B), counts)


def inputs_and_call(theirs):
    """The same tokens as our batch, and as keyword arguments of their model."""
    tokens, targets = torch.randint(3, V, (B, N)), torch.randint(3, V, (B, M))
    if theirs.config.is_encoder_decoder:
        cross = Parts.of([[parts.full(0, M, 0, N)]] * B, M, N)
        ours = batch(stream(tokens, parts.full), stream(targets, parts.causal, cross))
        return ours, {"input_ids": tokens, "decoder_input_ids": targets}
    if theirs.config.model_type == "bert":
        segments = torch.randint(0, 2, (B, N))
        ours = batch(stream(tokens, parts.full, segments=segments))
        return ours, {"input_ids": tokens, "token_type_ids": segments}
    return batch(stream(tokens, parts.causal)), {"input_ids": tokens}


def converted(theirs):
    config = theirs.config.to_dict()
    model = interchange.settings_from(config)
    weights = interchange.from_hf(theirs.state_dict(), model, config["model_type"])
    return model, weights


@torch.no_grad()
def test_same_logits(theirs):
    model, weights = converted(theirs)
    ours = Transformer(model).eval()
    ours.load_state_dict(weights)  # strict: every name has its tensor
    our_batch, their_arguments = inputs_and_call(theirs)
    expected = theirs(**their_arguments).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.logits(our_batch), expected, atol=1e-5, rtol=1e-5)


def test_round_trip_is_exact(theirs):
    model, weights = converted(theirs)
    back = interchange.to_hf(weights, model, theirs.config.model_type)
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_faults_are_named():
    theirs = gpt2()
    model, state = interchange.settings_from(theirs.config.to_dict()), theirs.state_dict()
    with pytest.raises(ValueError, match=r"lack transformer\.ln_f\.weight"):
        interchange.from_hf(
            {k: v for k, v in state.items() if k != "transformer.ln_f.weight"}, model, "gpt2"
        )
    with pytest.raises(ValueError, match=r"no place .*extra\.weight"):
        interchange.from_hf(state | {"extra.weight": torch.zeros(1)}, model, "gpt2")
    with pytest.raises(ValueError, match=r"\[25, 24\] of positions"):
        table = {"transformer.wpe.weight": torch.zeros(25, 24)}
        interchange.from_hf(state | table, model, "gpt2")
    with pytest.raises(ValueError, match="model_type 'mamba'"):
        interchange.settings_from({"model_type": "mamba"})
    with pytest.raises(ValueError, match="scale_embedding"):
        interchange.settings_from(bart().config.to_dict() | {"scale_embedding": True})
