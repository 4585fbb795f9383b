"""Every key of a config counts: transformers' own defaults, spellings and refusals."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megaarch import config, interchange
from megaarch.config.schema import Model
from megaarch.interchange import FAMILIES
from megaarch.interchange.hf_config import ONLY, WITHOUT_EFFECT, complete, traits
from megaarch.model import Transformer, initialize
from tests.interchange.inputs import inputs_and_call
from tests.interchange.models import V, bart, bert, gpt2, llama, scattered, t5

CLASSES = {
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "bert": transformers.BertConfig,
    "t5": transformers.T5Config,
    "bart": transformers.BartConfig,
}


@pytest.mark.parametrize("family", CLASSES)
def test_every_key_of_the_class_is_known_and_defaults_are_its_own(family):
    found = FAMILIES[family]
    known = {
        *found.keys,
        *found.aliases(),
        *found.only,
        *ONLY,
        *found.without_effect.split(),
        *WITHOUT_EFFECT,
    }
    fields = {f.name: f.default for f in dataclasses.fields(CLASSES[family])}
    assert fields.keys() <= known
    assert found.aliases() == CLASSES[family].attribute_map
    for name, key in found.keys.items():
        if name in fields:
            assert fields[name] == key.default, name
    for name, allowed in found.only.items():
        if name in fields:
            assert fields[name] in allowed, name


@pytest.mark.parametrize("family", CLASSES)
def test_a_config_of_defaults_is_the_class_of_defaults(family):
    bare = interchange.settings_from({"model_type": family})
    told = json.loads(CLASSES[family]().to_json_string(use_diff=False))
    assert traits(bare) == traits(interchange.settings_from(told))


@pytest.mark.parametrize("family", CLASSES)
def test_an_unknown_key_is_refused_by_its_name(family):
    with pytest.raises(ValueError, match=r"attention_window: 7"):
        interchange.settings_from({"model_type": family, "attention_window": 7})


def given(family, **keys):
    return interchange.settings_from({"model_type": family, **keys})


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_every_spelling_of_rope_scaling_is_seen(name, word):
    family = "llama"
    for kind in ("linear", "dynamic"):
        scaling = given(family, **{name: {word: kind, "factor": 4.0}}).rope_scaling
        assert (scaling.kind, scaling.factor) == (kind, 4.0)
    yarn = {word: "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    found = given(family, **{name: yarn})
    assert found.rope_scaling.kind == "yarn" and found.rope_scaling.original_length == 64
    written = interchange.config_for(found, family)
    assert interchange.settings_from(written).rope_scaling == found.rope_scaling
    with pytest.raises(ValueError, match=f"{name}.rope_type: 'longrope'"):
        given(family, **{name: {word: "longrope", "factor": 4.0}})
    with pytest.raises(ValueError, match=rf"{name}\.beta_fast"):
        given(family, **{name: {word: "linear", "factor": 4.0, "beta_fast": 32}})
    with pytest.raises(ValueError, match=rf"lacks {name}\.factor"):
        given(family, **{name: {word: "linear"}})
    with pytest.raises(ValueError, match=rf"lacks {name}\.factor"):
        given(family, **{name: {word: "yarn", "mscale": 0.7, "mscale_all_dim": 1.0}})
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        given(family, partial_rotary_factor=0.5)


@pytest.mark.parametrize(
    ("family", "key", "taken", "refused"),
    [
        ("llama", "hidden_act", {"silu": "swiglu", "gelu_new": "geglu"}, ["gelu", "relu"]),
        ("gpt2", "activation_function", {"gelu": "gelu", "relu": "relu"}, ["silu", "quick_gelu"]),
        ("bert", "hidden_act", {"gelu_new": "gelu_tanh"}, ["silu"]),
        ("bart", "activation_function", {"gelu": "gelu"}, ["tanh", None]),
        (
            "t5",
            "feed_forward_proj",
            {"gated-silu": "swiglu", "gelu": "gelu"},
            ["gated-relu", "silu"],
        ),
    ],
)
def test_an_activation_is_ours_or_refused_by_its_key(family, key, taken, refused):
    for theirs, ours in taken.items():
        model = given(family, **{key: theirs})
        assert model.activation == ours
        again = interchange.settings_from(interchange.config_for(model, family))
        assert again.activation == ours
    for name in refused:
        with pytest.raises(ValueError, match=f"{key}: {name!r}"):
            given(family, **{key: name})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0])
def test_an_epsilon_that_is_none_is_told(value):
    with pytest.raises(ValueError, match="makes model.normalization_epsilon"):
        given("llama", rms_norm_eps=value)


def test_other_values_of_other_keys_are_refused_by_name():
    for family, key, value in (
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("bert", "position_embedding_type", "relative_key_query"),
        ("bert", "is_decoder", True),
        ("bart", "scale_embedding", True),
        ("bart", "normalize_before", True),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "mlp_bias", True),
        ("t5", "relative_attention_num_buckets", 1),
        ("t5", "dense_act_fn", "tanh"),
        ("bart", "decoder_ffn_dim", 5),
        ("bert", "type_vocab_size", 0),
        ("t5", "d_model", 0),
    ):
        with pytest.raises(ValueError, match=key):
            given(family, **{key: value})


@torch.no_grad()
def same_logits(weights, raw, theirs):
    """Whether our model of a file's tensors and config has transformers' logits."""
    weights, raw = interchange.settle(weights, raw)
    model = interchange.settings_from(raw)
    ours = Transformer(model).eval().double()
    ours.load_state_dict(interchange.from_hf(weights, model, raw["model_type"]))
    batch, arguments = inputs_and_call(theirs)
    expected = theirs.double()(**arguments).logits
    torch.testing.assert_close(ours.logits(batch), expected, atol=1e-4, rtol=1e-5)
    return model


def loaded(model, folder, tensors, **changes):
    """What transformers makes of a folder with these tensors and keys; and its config."""
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(
        {n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    again = type(model).from_pretrained(folder, local_files_only=True)
    return again.eval(), raw


def drawn(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=float("norm" in name.lower() and "weight" in name), std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (gpt2, "lm_head.weight"),
        (lambda: llama(tie_word_embeddings=True), "lm_head.weight"),
        (lambda: t5(True, "relu"), "lm_head.weight"),
        (bart, "lm_head.weight"),
        (bert, "cls.predictions.decoder.weight"),
    ],
)
def test_an_output_of_its_own_counts_though_the_config_ties_it(make, output, tmp_path):
    model = drawn(make())
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    tensors[output] = torch.randn_like(tensors[output])
    theirs, raw = loaded(model, tmp_path / "a", tensors)
    found = same_logits(tensors, raw, theirs)
    assert not found.tied_embedding
    if raw["model_type"] == "t5":
        assert found.output_scale  # tied by its config: scaled
    for name in (n for n in ("shared.weight", "transformer.wte.weight") if n in tensors):
        tensors[output] = tensors[name].clone()
        theirs, raw = loaded(model, tmp_path / "b", tensors)
        assert same_logits(tensors, raw, theirs).tied_embedding


def test_berts_output_bias_of_its_own_counts(tmp_path):
    for tied in (True, False):
        model = drawn(bert())
        tensors = {n: t.clone() for n, t in model.state_dict().items()}
        for name in ("cls.predictions.decoder.bias", "cls.predictions.decoder.weight"):
            tensors[name] = torch.randn_like(tensors[name])
        theirs, raw = loaded(model, tmp_path / str(tied), tensors, tie_word_embeddings=tied)
        found = same_logits(tensors, raw, theirs)
        assert not found.tied_embedding
    del tensors["cls.predictions.decoder.bias"]
    with pytest.raises(ValueError, match=r"lack cls\.predictions\.decoder\.bias"):
        interchange.settle(tensors, raw)


def test_an_untied_bart_has_an_output_and_one_embedding(tmp_path):
    model = drawn(bart())
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"])
    tensors["model.shared.weight"] = torch.randn_like(tensors["lm_head.weight"])  # nothing reads it
    theirs, raw = loaded(model, tmp_path / "a", tensors, tie_word_embeddings=False)
    found = same_logits(tensors, raw, theirs)
    assert not found.tied_embedding
    other = "model.decoder.embed_tokens.weight"
    with pytest.raises(ValueError, match=f"{other} and .* differ"):
        interchange.settle(tensors | {other: torch.randn_like(tensors[other])}, raw)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_t5_ties_and_scales_apart_both_ways(tied, scaled, tmp_path):
    model = drawn(t5(tied, "relu"))
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    theirs, raw = loaded(model, tmp_path / "a", tensors, scale_decoder_outputs=scaled)
    found = same_logits(tensors, raw, theirs)
    assert (found.tied_embedding, found.output_scale is not None) == (tied, scaled)
    written = interchange.config_for(found, "t5")
    weights, raw = interchange.settle(tensors, written)
    assert interchange.settings_from(raw) == found
    back = interchange.to_hf(interchange.from_hf(weights, found, "t5"), found, "t5")
    theirs, raw = loaded(model, tmp_path / "b", back, **written)
    assert same_logits(back, raw, theirs) == found


def test_a_model_of_t5xs_recipe_is_a_t5_where_it_has_an_encoder(tmp_path):
    recipe = {"initializer": "t5x", "position_encoding": "relative", "activation": "geglu"}
    sizes = {"layers": 1, "hidden_size": 32, "feed_forward_size": 48, "vocabulary_size": V}
    ours = Model(**recipe, **sizes, architecture="encoder_decoder")
    built = Transformer(ours)
    initialize(built, 0)
    written = interchange.config_for(ours, "t5")
    tensors = interchange.to_hf(built.state_dict(), ours, "t5")
    theirs, raw = loaded(drawn(t5(True, "gated-gelu")), tmp_path, tensors, **written)
    found = same_logits(tensors, raw, theirs)
    assert traits(found) == traits(ours)
    with pytest.raises(ValueError, match="model.position_encoding is relative and llama has rope"):
        interchange.config_for(Model(**recipe, **sizes), "llama")


def test_what_base_models_and_old_files_hold_is_taken(tmp_path):
    for name, family, extra in (
        ("bart", "bart", {"encoder.version": torch.ones(1)}),
        ("t5-v1.0", "t5", {}),
        ("gpt2", "gpt2", {"h.0.attn.bias": torch.ones(1, 1, 20, 20)}),
    ):
        head = scattered(name)
        if family == "bart":
            head.final_logits_bias.zero_()
        base = {"bart": "model", "gpt2": "transformer"}.get(family)
        tensors = dict((getattr(head, base) if base else head).state_dict())
        tensors.pop("lm_head.weight", None)
        same_logits(tensors | extra, head.config.to_dict() | {"model_type": family}, head)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    head = scattered("t5-v1.1")
    tensors = head.state_dict() | {unused: torch.ones(8, 3)}
    same_logits(tensors, head.config.to_dict(), head)
    with pytest.raises(ValueError, match=r"lack .*cls\.predictions"):
        head = bert()
        tensors, raw = interchange.settle(head.bert.state_dict(), head.config.to_dict())
        interchange.from_hf(tensors, interchange.settings_from(raw), "bert")


def test_a_tensor_under_two_names_is_refused():
    head = gpt2()
    tensors = head.state_dict()
    tensors["ln_f.weight"] = tensors["transformer.ln_f.weight"] + 1
    with pytest.raises(ValueError, match=r"hold transformer\.ln_f\.weight twice"):
        interchange.settle(tensors, head.config.to_dict())
    untied = head.state_dict() | {"lm_head.weight": torch.zeros(150, 24)}
    with pytest.raises(ValueError, match=r"wte\.weight and lm_head\.weight differ"):
        model = interchange.settings_from(head.config.to_dict())
        interchange.from_hf(untied, model, "gpt2")


def test_a_special_has_transformers_default_where_the_config_has_none():
    assert complete({"model_type": "t5"}, "t5")["eos_token_id"] == 1
    assert complete({"model_type": "bart"}, "bart")["decoder_start_token_id"] == 2
    assert complete({"model_type": "t5", "num_layers": 3, "head_dim": 9}, "t5")["d_kv"] == 9


def test_a_model_that_transformers_llama_refuses_is_not_written():
    odd = config.resolve({"model": {"hidden_size": 30, "heads": 4, "head_size": 8}}).model
    with pytest.raises(ValueError, match="4 heads do not divide hidden_size 30"):
        interchange.config_for(odd, "llama")


WHOLE = {
    name: [
        key
        for key, known in family.keys.items()
        if type(known.default) is int and known.default > 0
    ]
    for name, family in FAMILIES.items()
}
MORE = {
    "gpt2": ["n_inner"],
    "llama": ["num_key_value_heads", "head_dim", "original_max_position_embeddings"],
    "t5": ["num_decoder_layers"],
}


@pytest.mark.parametrize("family", CLASSES)
def test_a_size_that_is_no_whole_number_is_refused_by_its_key(family):
    for key in [*WHOLE[family], *MORE.get(family, ())]:
        refused = [10**12, "12", -5, 1.5, True, [12], {}]
        if FAMILIES[family].keys[key].default is not None and not key.endswith("_token_id"):
            refused.append(None)
        for value in refused:
            if value == [12] and key == "eos_token_id":
                continue
            with pytest.raises(
                ValueError, match=rf"^{key} of this Hugging Face config must be a whole"
            ):
                given(family, **{key: value})


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("gpt2", {"n_head": 7}, "n_head 7"),
        ("llama", {"num_attention_heads": 31}, "num_attention_heads 31"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ("llama", {"hidden_size": 96, "num_attention_heads": 32}, "head_dim"),
        ("llama", {"head_dim": 7}, "head_dim"),
        ("bert", {"hidden_size": 100}, "num_attention_heads 12"),
        ("bart", {"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "_heads 3"),
    ],
)
def test_heads_that_do_not_divide_are_refused_by_their_key(family, keys, named):
    with pytest.raises(ValueError, match=named):
        given(family, **keys)
