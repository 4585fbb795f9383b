"""The settings of GPT-2, Llama, BERT, T5 and BART models, from a Hugging Face config.json and back.

A family is named as Hugging Face's `model_type` names it: gpt2, llama, bert, t5, bart.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megaarch import settings
from megaarch.model.layers import head_size, key_heads
from megaarch.model.transformer import stacks

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def settings_from(config: Mapping) -> settings.Model:
    """The model settings of a Hugging Face `config.json` (or `config.to_dict()`).

    ValueError for a family or an option that megaarch cannot express, that is missing or of a wrong
    type.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _SETTINGS:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(_SETTINGS)}")
    try:
        return settings.Model(**_SETTINGS[kind](config))
    except KeyError as error:
        raise ValueError(f"this Hugging Face config lacks {error.args[0]}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        raise ValueError(
            f"this Hugging Face config makes model.{name} {fault['input']!r}: {fault['msg']}"
        ) from None
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"a value of this Hugging Face config has a wrong type: {error}"
        ) from error


def config_for(model: settings.Model, family: str, position_axes: int = 1) -> dict[str, Any]:
    """The `config.json` of a model in this family.

    ValueError names every setting in which the family has no such model.
    """
    config = _CONFIGS[family](model) | {"model_type": family}
    theirs = traits(settings_from(config))
    wrong = [
        f"model.{name} is {value} and {family} has {theirs[name]}"
        for name, value in traits(model).items()
        if not _equal(value, theirs[name])
        and not (family == "llama" and value == "prefix_decoder")  # the same weights
    ]
    if position_axes > 1:
        wrong.append(f"its positions have {position_axes} axes and {family}'s have one")
    if wrong:
        raise ValueError(f"this is no {family} model: {'; '.join(wrong)}")
    return config


def family_of(model: settings.Model) -> str:
    """The family that comes nearest to a model. ValueError where there is none."""
    positions = model.position_encoding
    if model.architecture in ("causal_decoder", "prefix_decoder"):
        return "gpt2" if positions == "learned" else "llama"
    if model.architecture == "encoder_decoder":
        return "bart" if positions == "learned" else "t5"
    if model.architecture == "encoder":
        return "bert"
    raise ValueError(f"no Hugging Face family here has the architecture {model.architecture}")


def traits(model: settings.Model) -> dict[str, Any]:
    """What makes up a model, with defaults filled in and without what does not apply to it."""
    found = {
        "architecture": model.architecture,
        "layers": [len(stack.layers) for stack in stacks(model)],
        "heads": model.heads,
        "kv_heads": key_heads(model),
        "head_size": head_size(model),
        "attention_scale": model.attention_scale or head_size(model) ** -0.5,
        "learned_positions": _table_rows(model) if _learned(model) else None,
        "position_offset": model.position_offset if _learned(model) else None,
        "rope_base": model.rope_base if model.position_encoding == "rope" else None,
    }
    relative = model.position_encoding == "relative"
    for name in ("relative_buckets", "relative_max_distance"):
        found[name] = getattr(model, name) if relative else None
    for name in _PLAIN:
        found[name] = getattr(model, name)
    return found


_PLAIN = (
    "hidden_size",
    "feed_forward_size",
    "vocabulary_size",
    "normalization",
    "normalization_position",
    "normalization_epsilon",
    "final_normalization",
    "position_encoding",
    "activation",
    "bias",
    "tied_embedding",
    "embedding_normalization",
    "output_scale",
    "segments",
    "head_transform",
    "output_bias",
)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-9 * abs(ours)
    return ours == theirs


def _learned(model: settings.Model) -> bool:
    return model.position_encoding == "learned"


def _table_rows(model: settings.Model) -> int:
    return model.learned_positions or max(model.sequence_length, model.target_length or 0)


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


def _activation_name(model: settings.Model) -> str:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return names.get(model.activation, "gelu")  # of a gated one, the mismatch is told


def _from_gpt2(c: Mapping) -> dict:
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


def _from_llama(c: Mapping) -> dict:
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


def _from_bert(c: Mapping) -> dict:
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


def _from_t5(c: Mapping) -> dict:
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


def _from_bart(c: Mapping) -> dict:
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


def _to_gpt2(m: settings.Model) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": len(stacks(m)[-1].layers),
        "n_embd": m.hidden_size,
        "n_head": m.heads,
        "n_inner": m.feed_forward_size,
        "n_positions": _table_rows(m),
        "vocab_size": m.vocabulary_size,
        "layer_norm_epsilon": m.normalization_epsilon,
        "activation_function": _activation_name(m),
        "tie_word_embeddings": m.tied_embedding,
        "initializer_range": m.initial_deviation,
    } | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), m.dropout)


def _to_llama(m: settings.Model) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": len(stacks(m)[-1].layers),
        "hidden_size": m.hidden_size,
        "num_attention_heads": m.heads,
        "num_key_value_heads": key_heads(m),
        "head_dim": head_size(m),
        "intermediate_size": m.feed_forward_size,
        "max_position_embeddings": m.sequence_length,
        "vocab_size": m.vocabulary_size,
        "rms_norm_eps": m.normalization_epsilon,
        "rope_theta": m.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_base},
        "hidden_act": "silu",
        "attention_bias": m.bias,
        "mlp_bias": m.bias,
        "tie_word_embeddings": m.tied_embedding,
        "initializer_range": m.initial_deviation,
        "attention_dropout": 0.0,
    }


def _to_bert(m: settings.Model) -> dict[str, Any]:
    return {
        "architectures": ["BertForMaskedLM"],
        "num_hidden_layers": len(stacks(m)[-1].layers),
        "hidden_size": m.hidden_size,
        "num_attention_heads": m.heads,
        "intermediate_size": m.feed_forward_size,
        "max_position_embeddings": _table_rows(m),
        "vocab_size": m.vocabulary_size,
        "layer_norm_eps": m.normalization_epsilon,
        "hidden_act": _activation_name(m),
        "type_vocab_size": m.segments,
        "tie_word_embeddings": m.tied_embedding,
        "initializer_range": m.initial_deviation,
        "hidden_dropout_prob": m.dropout,
        "attention_probs_dropout_prob": m.dropout,
    }


def _to_t5(m: settings.Model) -> dict[str, Any]:
    counts = [len(stack.layers) for stack in stacks(m)]
    plain = {"relu": "relu", "gelu_tanh": "gelu_new"}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "num_layers": counts[0],
        "num_decoder_layers": counts[-1],
        "d_model": m.hidden_size,
        "num_heads": m.heads,
        "d_kv": head_size(m),
        "d_ff": m.feed_forward_size,
        "vocab_size": m.vocabulary_size,
        "layer_norm_epsilon": m.normalization_epsilon,
        "relative_attention_num_buckets": m.relative_buckets,
        "relative_attention_max_distance": m.relative_max_distance,
        "feed_forward_proj": plain.get(m.activation, "gated-gelu"),
        "tie_word_embeddings": m.tied_embedding,
        "dropout_rate": m.dropout,
    }


def _to_bart(m: settings.Model) -> dict[str, Any]:
    counts = [len(stack.layers) for stack in stacks(m)]
    config = {
        "architectures": ["BartForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder_layers": counts[0],
        "decoder_layers": counts[-1],
        "d_model": m.hidden_size,
        "max_position_embeddings": _table_rows(m),
        "vocab_size": m.vocabulary_size,
        "activation_function": _activation_name(m),
        "scale_embedding": False,
        "tie_word_embeddings": m.tied_embedding,
        "init_std": m.initial_deviation,
        "forced_eos_token_id": None,
    }
    for stack in ("encoder", "decoder"):
        config |= {
            f"{stack}_attention_heads": m.heads,
            f"{stack}_ffn_dim": m.feed_forward_size,
        }
    names = ("dropout", "attention_dropout", "activation_dropout")
    return config | dict.fromkeys(names, m.dropout)


_SETTINGS = {
    "gpt2": _from_gpt2,
    "llama": _from_llama,
    "bert": _from_bert,
    "t5": _from_t5,
    "bart": _from_bart,
}
_CONFIGS = {
    "gpt2": _to_gpt2,
    "llama": _to_llama,
    "bert": _to_bert,
    "t5": _to_t5,
    "bart": _to_bart,
}
