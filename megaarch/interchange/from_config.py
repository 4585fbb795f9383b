"""The model settings of a Hugging Face config, a function a family."""

from collections.abc import Mapping
from typing import Any

from megaarch.attention.bias import bucket_fault
from megaarch.errors import UserError
from megaarch.interchange import rope

# Theirs -> ours; some are further names of the same function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# Of gated units. GEGLU's gelu is tanh's here, so that of `gelu` (by erf) is another function.
GATES = {"silu": "swiglu", "swish": "swiglu"} | {
    theirs: "geglu" for theirs, ours in ACTIVATIONS.items() if ours == "gelu_tanh"
}

Used = Mapping[str, Any]  # of `keys.complete`


def activation(config: Used, key: str, gated: bool = False, name: Any = None) -> str:
    """Ours. name: theirs, where it is not the key's value as it stands. ValueError names the key."""
    known, name = GATES if gated else ACTIVATIONS, config[key] if name is None else name
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"megaarch cannot express {key}: {config[key]!r} of this Hugging Face config: the "
            f"activation of a {'gated' if gated else 'plain'} unit is one of {', '.join(known)}"
        )
    return known[name]


def same(config: Used, first: str, second: str) -> Any:
    if config[first] != config[second]:
        raise UserError(
            f"{first} and {second} of this Hugging Face config differ; megaarch needs them equal"
        )
    return config[first]


def gpt2(c: Used) -> dict:
    return {
        "architecture": "causal_decoder",
        "layers": c["n_layer"],
        "hidden_size": c["n_embd"],
        "heads": c["n_head"],
        "feed_forward_size": 4 * c["n_embd"] if c["n_inner"] is None else c["n_inner"],
        "sequence_length": c["n_positions"],
        "vocabulary_size": c["vocab_size"],
        "normalization": "layernorm",
        "normalization_epsilon": c["layer_norm_epsilon"],
        "position_encoding": "learned",
        "activation": activation(c, "activation_function"),
        "bias": True,
        "attention_scale": None if c["scale_attn_weights"] else 1.0,
        "tied_embedding": c["tie_word_embeddings"],
    }


def llama(c: Used) -> dict:
    base, scaling = rope.from_hf(c)
    return {
        "architecture": "causal_decoder",
        "layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c["num_key_value_heads"],
        "head_size": c["head_dim"],
        "feed_forward_size": c["intermediate_size"],
        "sequence_length": c["max_position_embeddings"],
        "vocabulary_size": c["vocab_size"],
        "normalization_epsilon": c["rms_norm_eps"],
        "rope_base": base,
        "rope_scaling": scaling,
        "activation": activation(c, "hidden_act", gated=True),
        "bias": same(c, "attention_bias", "mlp_bias"),
        "tied_embedding": c["tie_word_embeddings"],
    }


def bert(c: Used) -> dict:
    if c["type_vocab_size"] == 0:
        raise UserError("type_vocab_size of this Hugging Face config is 0: BERT needs segments")
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
        "activation": activation(c, "hidden_act"),
        "bias": True,
        "tied_embedding": c["tie_word_embeddings"],
        "embedding_normalization": True,
        "segments": c["type_vocab_size"],
        "head_transform": True,
        "output_bias": True,
    }


def t5(c: Used) -> dict:
    # T5 1.0 ties the output to the embedding and scales; v1.1 does neither, and its configs say so
    # by tie_word_embeddings alone, which transformers 5 reads as whether to scale.
    tied, scaled = c["tie_word_embeddings"] is not False, c["scale_decoder_outputs"]
    buckets, distance = (
        c[f"relative_attention_{name}"] for name in ("num_buckets", "max_distance")
    )
    for both_ways in (True, False):  # the encoder's and the decoder's
        if fault := bucket_fault(buckets, both_ways, distance):
            raise UserError(
                "relative_attention_num_buckets and relative_attention_max_distance of this Hugging "
                f"Face config do not go together: {fault}"
            )
    return {
        "architecture": "encoder_decoder",
        "layers": c["num_layers"],
        "decoder_layers": c["num_decoder_layers"],
        "hidden_size": c["d_model"],
        "heads": c["num_heads"],
        "head_size": c["d_kv"],
        "feed_forward_size": c["d_ff"],
        "vocabulary_size": c["vocab_size"],
        "normalization_epsilon": c["layer_norm_epsilon"],
        "position_encoding": "relative",
        "relative_buckets": buckets,
        "relative_max_distance": distance,
        "activation": _t5_activation(c),
        "attention_scale": 1.0,
        "tied_embedding": tied,
        "output_scale": c["d_model"] ** -0.5 if (tied if scaled is None else scaled) else None,
    }


def _t5_activation(c: Used) -> str:
    words = c["feed_forward_proj"].split("-")
    if len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise UserError(f"megaarch cannot express feed_forward_proj {c['feed_forward_proj']!r}")
    gated = words[0] == "gated" if c["is_gated_act"] is None else c["is_gated_act"]
    if c["dense_act_fn"] is not None:
        return activation(c, "dense_act_fn", gated)
    name = "gelu_new" if c["feed_forward_proj"] == "gated-gelu" else words[-1]
    return activation(c, "feed_forward_proj", gated, name)


def bart(c: Used) -> dict:
    return {
        "architecture": "encoder_decoder",
        "encoder_layers": c["encoder_layers"],
        "decoder_layers": c["decoder_layers"],
        "hidden_size": c["d_model"],
        "heads": same(c, "encoder_attention_heads", "decoder_attention_heads"),
        "feed_forward_size": same(c, "encoder_ffn_dim", "decoder_ffn_dim"),
        "sequence_length": c["max_position_embeddings"],
        "vocabulary_size": c["vocab_size"],
        "normalization": "layernorm",
        "normalization_position": "post",
        "normalization_epsilon": 1e-5,
        "final_normalization": False,
        "position_encoding": "learned",
        "position_offset": 2,
        "activation": activation(c, "activation_function"),
        "bias": True,
        "tied_embedding": c["tie_word_embeddings"],
        "embedding_normalization": True,
        "output_bias": True,
    }
