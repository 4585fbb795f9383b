"""Settings and weights of GPT-2, Llama, BERT, T5 and BART, from Hugging Face and back.

A family is named as Hugging Face's `model_type` names it: gpt2, llama, bert, t5, bart.
"""

from collections.abc import Mapping

import torch

from megaarch import settings
from megaarch.interchange.families import FAMILIES, Family
from megaarch.interchange.layouts import Layout
from megaarch.model.transformer import Transformer, stacks

Weights = dict[str, torch.Tensor]
# Buffers, and heads for objectives that megaarch has not (BERT's next-sentence prediction).
IGNORED = (
    ".attn.bias",
    ".attn.masked_bias",
    ".position_ids",
    ".inv_freq",
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def settings_from(config: Mapping) -> settings.Model:
    """The model settings of a Hugging Face `config.json` (or `config.to_dict()`).

    ValueError for a family or an option that megaarch cannot express.
    """
    kind = config.get("model_type")
    if kind not in _SETTINGS:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(_SETTINGS)}")
    return settings.Model(**_SETTINGS[kind](config))


def from_hf(weights: Mapping[str, torch.Tensor], model: settings.Model, family: str) -> Weights:
    """Our state dict, from a Hugging Face state dict of `family` ("gpt2", "llama", ...).

    ValueError names tensors that are missing, left over, or of a wrong shape.
    """
    table, shapes = _table(model, family), _shapes(model)
    known = {name for _, names, copies in table.values() for name in (*names, *copies)}
    missing = {name for _, names, _ in table.values() for name in names} - weights.keys()
    extra = [n for n in weights if n not in known and not n.endswith(IGNORED)]
    for names, what in (
        (sorted(missing), "lack"),
        (extra, "hold what the model has no place for:"),
    ):
        if names:
            raise ValueError(f"the {family} weights {what} {', '.join(names[:5])}")
    ours = {}
    for name, (layout, names, _) in table.items():
        ours[name] = layout.fuse([weights[n] for n in names], model).contiguous()
        if ours[name].shape != shapes[name]:
            raise ValueError(
                f"{', '.join(names)} make {list(ours[name].shape)} of {name}, which has "
                f"{list(shapes[name])} in these model settings"
            )
    return ours


def to_hf(weights: Mapping[str, torch.Tensor], model: settings.Model, family: str) -> Weights:
    """A Hugging Face state dict of `family`, tied copies included, from ours."""
    theirs = {}
    for ours, (layout, names, copies) in _table(model, family).items():
        tensors = layout.split(weights[ours], model)
        theirs |= {n: t.contiguous() for n, t in zip(names, tensors, strict=True)}
        theirs |= dict.fromkeys(copies, theirs[names[0]])
    return theirs


def _shapes(model: settings.Model) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(model).named_parameters()}


def _table(
    model: settings.Model, family: str
) -> dict[str, tuple[Layout, tuple[str, ...], tuple[str, ...]]]:
    """Each of our parameters: its layout, the names it is made of, further names of the same."""
    tables = FAMILIES[family]
    found = {}
    for name in _shapes(model):
        layout, names = _find(name, tables, model)
        copies = tables.copies.get(name, ())
        if name == "embedding.weight" and not model.tied_embedding:
            copies = copies[:-1]  # the last one is the output layer
        found[name] = layout, names, copies
    return found


def _find(name: str, family: Family, model: settings.Model) -> tuple[Layout, tuple[str, ...]]:
    table, index = family.once, ""
    key = name
    if name.startswith("layers."):
        _, number, key = name.split(".", 2)
        stack = next(s for s in stacks(model) if int(number) in s.layers)
        table, index = family.layers[stack.stream], str(int(number) - stack.layers.start)
    module, _, leaf = key.rpartition(".")
    if key in table:
        layout, names = table[key]
    elif module in table:
        layout, names = table[module]
        names = tuple(f"{n}.{leaf}" for n in names)
    else:
        raise ValueError(f"{name} has no counterpart in this Hugging Face family")
    return layout, tuple(n.format(i=index) for n in names)


def _refuse(config: Mapping, **unsupported: object) -> None:
    for key, value in unsupported.items():
        if config.get(key) == value:
            raise ValueError(f"megaarch cannot express {key}: {value} of this Hugging Face config")


def _same(config: Mapping, first: str, second: str) -> object:
    if config[first] != config[second]:
        raise ValueError(
            f"{first} and {second} of this Hugging Face config differ; megaarch needs them equal"
        )
    return config[first]


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gpt2(c: Mapping) -> dict:
    _refuse(c, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False)
    return {
        "architecture": "causal_decoder",
        "layers": c["n_layer"],
        "hidden_size": c["n_embd"],
        "heads": c["n_head"],
        "feed_forward_size": c.get("n_inner") or 4 * c["n_embd"],
        "sequence_length": c["n_positions"],
        "vocabulary_size": c["vocab_size"],
        "normalization": "layernorm",
        "normalization_epsilon": c["layer_norm_epsilon"],
        "position_encoding": "learned",
        "activation": _activation(c["activation_function"]),
        "bias": True,
        "tied_embedding": c.get("tie_word_embeddings", True),
    }


def _llama(c: Mapping) -> dict:
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"megaarch cannot express rope_type {rope['rope_type']!r}")
    bias = {"attention_bias": False, "mlp_bias": False} | dict(c)
    return {
        "architecture": "causal_decoder",
        "layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c.get("num_key_value_heads"),
        "head_size": c.get("head_dim"),
        "feed_forward_size": c["intermediate_size"],
        "sequence_length": c["max_position_embeddings"],
        "vocabulary_size": c["vocab_size"],
        "normalization_epsilon": c["rms_norm_eps"],
        "rope_base": rope.get("rope_theta") or c.get("rope_theta", 10000.0),
        "activation": "swiglu",
        "bias": _same(bias, "attention_bias", "mlp_bias"),
        "tied_embedding": c.get("tie_word_embeddings", False),
    }


def _bert(c: Mapping) -> dict:
    _refuse(c, is_decoder=True, position_embedding_type="relative_key")
    return {
        "architecture": "encoder",
        "layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "feed_forward_size": c["intermediate_size"],
        "sequence_length": c["max_position_embeddings"],
        "vocabulary_size": c["vocab_size"],
        "normalization": "layernorm",
        "normalization_position": "post",
        "normalization_epsilon": c["layer_norm_eps"],
        "final_normalization": False,
        "position_encoding": "learned",
        "activation": _activation(c["hidden_act"]),
        "bias": True,
        "tied_embedding": c.get("tie_word_embeddings", True),
        "embedding_normalization": True,
        "segments": c["type_vocab_size"],
        "head_transform": True,
        "output_bias": True,
    }


def _t5(c: Mapping) -> dict:
    # T5 1.0 ties the output to the embedding and scales; v1.1 does neither. Configs say it twice.
    tied = c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True))
    gate, _, act = c["feed_forward_proj"].rpartition("-")
    if (gate, act) not in (("gated", "gelu"), ("", "relu"), ("", "gelu_new")):
        raise ValueError(f"megaarch cannot express feed_forward_proj {c['feed_forward_proj']!r}")
    return {
        "architecture": "encoder_decoder",
        "layers": c["num_layers"],
        "decoder_layers": c.get("num_decoder_layers"),
        "hidden_size": c["d_model"],
        "heads": c["num_heads"],
        "head_size": c["d_kv"],
        "feed_forward_size": c["d_ff"],
        "vocabulary_size": c["vocab_size"],
        "normalization_epsilon": c["layer_norm_epsilon"],
        "position_encoding": "relative",
        "relative_buckets": c["relative_attention_num_buckets"],
        "relative_max_distance": c.get("relative_attention_max_distance", 128),
        "activation": "geglu" if gate else _activation(act),
        "attention_scale": 1.0,
        "tied_embedding": tied,
        "output_scale": c["d_model"] ** -0.5 if tied else None,
    }


def _bart(c: Mapping) -> dict:
    _refuse(c, scale_embedding=True)
    return {
        "architecture": "encoder_decoder",
        "encoder_layers": c["encoder_layers"],
        "decoder_layers": c["decoder_layers"],
        "hidden_size": c["d_model"],
        "heads": _same(c, "encoder_attention_heads", "decoder_attention_heads"),
        "feed_forward_size": _same(c, "encoder_ffn_dim", "decoder_ffn_dim"),
        "sequence_length": c["max_position_embeddings"],
        "vocabulary_size": c["vocab_size"],
        "normalization": "layernorm",
        "normalization_position": "post",
        "normalization_epsilon": 1e-5,
        "final_normalization": False,
        "position_encoding": "learned",
        "position_offset": 2,
        "activation": _activation(c["activation_function"]),
        "bias": True,
        "tied_embedding": c.get("tie_word_embeddings", True),
        "embedding_normalization": True,
        "output_bias": True,
    }


_SETTINGS = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "t5": _t5, "bart": _bart}
