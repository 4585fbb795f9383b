"""Hugging Face folders over the options of transformers' five config classes, drawn from a seed.

Each has a config.json in some spelling, tensors under some names, and `blame`: the keys and tensors
that megaarch may refuse it for, by their names in the folder. Where that is empty it has to convert.
"""

import json
import random
from dataclasses import dataclass, field

import torch
import transformers
from safetensors.torch import save_file

V = 48
FAMILIES = ("gpt2", "llama", "bert", "t5", "bart")
HEADED = {
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "bert": transformers.BertForMaskedLM,
    "t5": transformers.T5ForConditionalGeneration,
    "bart": transformers.BartForConditionalGeneration,
}
AUTO = {
    "gpt2": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForMaskedLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "bart": transformers.AutoModelForSeq2SeqLM,
}
ABSENT = object()


@dataclass
class Drawn:
    family: str
    config: dict
    tensors: dict = field(default_factory=dict)
    blame: set = field(default_factory=set)
    told: list = field(default_factory=list)  # what was drawn, for a failure's message


class Draw:
    """Draws options into a config: `key(name, expressible values, other values)`."""

    def __init__(self, rng: random.Random, drawn: Drawn):
        self.rng, self.drawn = rng, drawn

    def key(self, name, good, bad=(), chance_of_bad=0.08):
        value = self.rng.choice(good)
        if bad and self.rng.random() < chance_of_bad:
            value = self.rng.choice(bad)
            self.drawn.blame.add(name)
        if value is not ABSENT:
            self.drawn.config[name] = value
            self.drawn.told.append(f"{name}={value!r}")
        return value

    def maybe(self, name, chance=0.3):
        happens = self.rng.random() < chance
        if happens:
            self.drawn.told.append(name)
        return happens


def _gpt2(d):
    width = d.rng.choice(("n_embd", "hidden_size"))
    d.key(width, [24, 12])
    d.key(d.rng.choice(("n_layer", "num_hidden_layers")), [1, 2])
    d.key("n_head", [1, 2, 3])
    d.key("n_positions", [20, 31])
    d.key("n_inner", [ABSENT, None, 40])
    good = [ABSENT, "gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "relu"]
    d.key("activation_function", good, ["silu", "quick_gelu", "tanh", "relu2"])
    d.key("layer_norm_epsilon", [ABSENT, 1e-3])
    d.key("scale_attn_weights", [ABSENT, True, False])
    d.key("scale_attn_by_inverse_layer_idx", [ABSENT, False], [True])
    d.key("reorder_and_upcast_attn", [ABSENT, True])
    d.key("add_cross_attention", [ABSENT, False], [True])
    d.key("tie_word_embeddings", [ABSENT, True, False])
    d.key("attn_pdrop", [ABSENT, 0.5])
    d.key("n_ctx", [ABSENT, 20])
    d.key("summary_type", [ABSENT, "mean"])


def _llama(d):
    d.key("hidden_size", [24])
    d.key("num_hidden_layers", [1, 2])
    heads = d.key("num_attention_heads", [2, 4])
    d.key("num_key_value_heads", [ABSENT, None, 1, 2, heads])
    size = d.key("head_dim", [ABSENT, None, 8])
    d.key("intermediate_size", [40])
    d.key("max_position_embeddings", [64, 128])
    d.key("rms_norm_eps", [ABSENT, 1e-3])
    good = [ABSENT, "silu", "swish", "gelu_pytorch_tanh", "gelu_new"]
    d.key("hidden_act", good, ["gelu", "relu", "tanh"])
    bias = d.key("attention_bias", [ABSENT, False, True])
    same = [True] if bias is True else [ABSENT, False]
    other = [False] if bias is True else [True]
    d.key("mlp_bias", same, other)
    d.key("tie_word_embeddings", [ABSENT, True, False])
    d.key("pretraining_tp", [ABSENT, 1, 2])
    d.key("attention_dropout", [ABSENT, 0.5])
    d.key("partial_rotary_factor", [ABSENT, 1.0], [0.5])
    _rope(d, size if size == 8 else 24 // heads)


def _rope(d, head_size):
    theta = d.key("rope_theta", [ABSENT, 100.0, 5e5])
    name = d.rng.choice(("rope_scaling", "rope_parameters"))
    word = d.rng.choice(("rope_type", "type"))
    original = d.rng.choice((ABSENT, 16, 32))
    kinds = {
        "default": {},
        "linear": {"factor": d.rng.choice((2.0, 4.0, 4))},
        "dynamic": {"factor": 4.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": 4.0}
        | d.rng.choice(
            (
                {},
                {"attention_factor": 1.5},
                {"beta_fast": 8, "beta_slow": 2, "truncate": False},
                {"mscale": 0.7, "mscale_all_dim": 1.2},
                {"factor": None},
            )
        ),
        "longrope": {"factor": 4.0}
        | dict.fromkeys(("short_factor", "long_factor"), [2.0] * (head_size // 2)),
    }
    kind = d.rng.choice((None, *kinds))
    if kind is None:
        return
    parameters = {word: kind} | kinds[kind]
    if kind in ("llama3", "yarn", "longrope") and original is not ABSENT:
        parameters["original_max_position_embeddings"] = original
    if parameters.get("factor", 1) is None:  # then the lengths' ratio has to say it
        parameters["original_max_position_embeddings"] = 32
    if theta is ABSENT and name == "rope_parameters":
        parameters["rope_theta"] = 50.0
    if kind == "longrope":
        d.drawn.blame.add("rope_type")
    d.key(name, [parameters])


def _bert(d):
    d.key("hidden_size", [24])
    d.key("num_hidden_layers", [1, 2])
    d.key("num_attention_heads", [1, 3])
    d.key("intermediate_size", [40])
    d.key("max_position_embeddings", [20, 31])
    good = [ABSENT, "gelu", "gelu_new", "relu", "gelu_python"]
    d.key("hidden_act", good, ["silu", "mish"])
    d.key("type_vocab_size", [ABSENT, 1, 3])
    d.key("layer_norm_eps", [ABSENT, 1e-3])
    d.key("tie_word_embeddings", [ABSENT, True, False])
    d.key("position_embedding_type", [ABSENT, "absolute"], ["relative_key", "relative_key_query"])
    d.key("is_decoder", [ABSENT, False], [True])
    d.key("pad_token_id", [ABSENT, 0, 3])
    d.key("hidden_dropout_prob", [ABSENT, 0.5])
    d.key("chunk_size_feed_forward", [ABSENT, 4])


def _t5(d):
    d.key("d_model", [24])
    d.key("d_kv", [6, 8])
    d.key("d_ff", [40])
    d.key("num_layers", [1, 2])
    d.key("num_decoder_layers", [ABSENT, None, 1, 3])
    d.key("num_heads", [2, 3])
    good = [ABSENT, "relu", "gated-gelu", "gated-silu", "gelu_new", "gelu", "gated-gelu_new"]
    act = d.key("feed_forward_proj", good, ["gated-relu", "silu", "tanh"])
    if act == "gated-gelu":
        if d.key("dense_act_fn", [ABSENT, "gelu_new"], ["gelu"]) == "gelu":
            d.drawn.blame.add("dense_act_fn")
        d.key("is_gated_act", [ABSENT, True])
    buckets = d.key("relative_attention_num_buckets", [ABSENT, 8, 32])
    distance = d.key("relative_attention_max_distance", [ABSENT, 10, 128])
    if distance == 10 and buckets != 8:  # half of the decoder's buckets are for single distances
        d.drawn.blame.add("relative_attention_num_buckets")
    d.key("layer_norm_epsilon", [ABSENT, 1e-3])
    d.key("tie_word_embeddings", [ABSENT, True, False])
    d.key("scale_decoder_outputs", [ABSENT, ABSENT, True, False])
    d.key("is_decoder", [ABSENT, False], [True])
    d.key("n_positions", [ABSENT, 512])
    d.key("dropout_rate", [ABSENT, 0.5])


def _bart(d):
    d.key("d_model", [24])
    d.key("encoder_layers", [1, 2])
    d.key("decoder_layers", [1, 2])
    heads = d.key("encoder_attention_heads", [2, 3])
    d.key("decoder_attention_heads", [heads], [1])
    d.key("encoder_ffn_dim", [40])
    d.key("decoder_ffn_dim", [40], [32])
    d.key("max_position_embeddings", [20, 31])
    d.key("activation_function", [ABSENT, "gelu", "gelu_new", "relu"], ["silu", "tanh"])
    d.key("scale_embedding", [ABSENT, False], [True], 0.15)
    d.key("tie_word_embeddings", [ABSENT, True, False])
    d.key("normalize_before", [ABSENT, False], [True])
    d.key("encoder_layerdrop", [ABSENT, 0.5])
    d.key("pad_token_id", [ABSENT, 3])


_OPTIONS = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "t5": _t5, "bart": _bart}
_EMBEDDING = {
    "gpt2": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
    "t5": "shared.weight",
    "bart": "model.shared.weight",
}
_OUTPUT = dict.fromkeys(FAMILIES, "lm_head.weight") | {"bert": "cls.predictions.decoder.weight"}
_PREFIX = {"gpt2": "transformer.", "llama": "model.", "bert": "bert.", "bart": "model.", "t5": ""}
_BUFFERS = {
    "gpt2": {"transformer.h.0.attn.bias": [1, 1, 20, 20], "transformer.h.0.attn.masked_bias": []},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": [4]},
    "bert": {
        "bert.embeddings.position_ids": [1, 20],
        "bert.pooler.dense.weight": [24, 24],
        "bert.pooler.dense.bias": [24],
        "cls.seq_relationship.weight": [2, 24],
    },
    "t5": {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": [32, 2]},
    "bart": {"model.encoder.version": [1], "model.decoder.version": [1]},
}


def draw(seed: int) -> Drawn:
    rng = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    drawn = Drawn(family, {"model_type": family, "vocab_size": V})
    d = Draw(rng, drawn)
    _OPTIONS[family](d)
    d.key("torch_dtype", [ABSENT, "float16"])
    d.key("task_specific_params", [ABSENT, {"summarization": {"num_beams": 4}}])
    d.key("id2label", [ABSENT, {"0": "A", "1": "B"}])
    d.key("attention_window", [ABSENT], [7], 0.04)  # of no class
    d.key("quantization_config", [ABSENT], [{"quant_method": "none"}], 0.03)
    config = dict(drawn.config)
    for key in ("attention_window", "quantization_config", "partial_rotary_factor"):
        config.pop(key, None)  # which some of transformers' classes stumble over
    torch.manual_seed(seed)
    model = HEADED[family](transformers.AutoConfig.for_model(**_copied(config)))
    drawn.tensors = {name: t.clone() for name, t in model.state_dict().items()}
    for name, tensor in drawn.tensors.items():
        norm = "norm" in name.lower() or "ln_" in name
        tensor.normal_(mean=float(norm and name.endswith("weight")), std=0.25)
    _tie(d, model)
    _edit(d)
    return drawn


def _copied(config: dict) -> dict:
    return json.loads(json.dumps(config))


def _tie(d: Draw, model) -> None:
    """Names that transformers ties get the same values, or lack, or, now and then, differ."""
    tensors, family = d.drawn.tensors, d.drawn.family
    for target, source in model.all_tied_weights_keys.items():
        if d.maybe(f"own {target}", 0.15):
            if "embed_tokens" in target:
                d.drawn.blame.add("embed_tokens")
        elif d.maybe(f"without {target}", 0.6):
            del tensors[target]
        else:
            tensors[target] = tensors[source].clone()
    if family == "bart" and not model.config.tie_word_embeddings:
        names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
        if d.maybe("two embeddings", 0.3):
            d.drawn.blame.add("embed_tokens")
        else:
            tensors[names[1]] = tensors[names[0]].clone()
    output, embedding = _OUTPUT[family], _EMBEDDING[family]
    if output in tensors and d.maybe(f"without {embedding}", 0.1):
        if not model.config.tie_word_embeddings:
            d.drawn.blame.add(embedding)
        elif family in ("t5", "bart") and not torch.equal(
            *(tensors.get(name, tensors[output]) for name in (output, embedding))
        ):
            d.drawn.blame.add("embed_tokens")
        del tensors[embedding]


def _edit(d: Draw) -> None:
    """What old and other files do: no prefix, former names, buffers, tensors too few or too many."""
    drawn, family = d.drawn, d.drawn.family
    tensors = drawn.tensors
    if d.maybe("buffers"):
        tensors |= {name: torch.rand(size) for name, size in _BUFFERS[family].items()}
    if family == "bart" and d.maybe("without final_logits_bias"):
        tensors.pop("final_logits_bias")
    if d.maybe("without prefix"):
        drawn.tensors = {name.removeprefix(_PREFIX[family]): t for name, t in tensors.items()}
    if family == "bert" and d.maybe("former names"):
        drawn.tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for name, t in drawn.tensors.items()
        }
    if d.maybe("base model", 0.1):
        heads = ("lm_head.", "cls.", "final_logits_bias")
        lost = [name for name in drawn.tensors if name.startswith(heads)]
        drawn.tensors = {n: t for n, t in drawn.tensors.items() if n not in lost}
        if family == "bert":
            drawn.blame.add("cls.predictions")
        tied = drawn.config.get("tie_word_embeddings", family != "llama")
        if family != "t5" and not tied:
            drawn.blame.add(_OUTPUT[family])
        drawn.blame.add(_EMBEDDING[family])  # which may have stood in the head alone
    if d.maybe("one too many", 0.03):
        drawn.tensors["extra.weight"] = torch.zeros(1)
        drawn.blame.add("extra.weight")
    if d.maybe("one too few", 0.03):
        name = d.rng.choice([n for n in drawn.tensors if "norm" in n.lower() or "ln_" in n])
        del drawn.tensors[name]
        drawn.blame.add(name.replace("gamma", "weight").replace("beta", "bias"))


def write(drawn: Drawn, folder, tokenizer) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(drawn.config))
    save_file(drawn.tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_bytes(tokenizer)
