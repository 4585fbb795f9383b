"""The Hugging Face config of model settings, a function a family.

Where the family has no such model, the config is of one that comes near: `configs.config_for` finds
what differs by reading it back.
"""

from typing import Any

from megaarch.config import schema
from megaarch.interchange import rope
from megaarch.interchange.from_config import ACTIVATIONS
from megaarch.model.layers import head_size, key_heads
from megaarch.model.transformer import stacks


def activation_name(model: schema.Model) -> str:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return names.get(model.activation, "gelu")  # of a gated one, the mismatch is told


def gpt2(m: schema.Model) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": len(stacks(m)[-1].layers),
        "n_embd": m.hidden_size,
        "n_head": m.heads,
        "n_inner": m.feed_forward_size,
        "n_positions": m.position_rows,
        "vocab_size": m.vocabulary_size,
        "layer_norm_epsilon": m.normalization_epsilon,
        "activation_function": activation_name(m),
        "scale_attn_weights": m.attention_scale != 1.0,
        "tie_word_embeddings": m.tied_embedding,
        "initializer_range": m.initial_deviation,
    } | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), m.dropout)


def llama(m: schema.Model) -> dict[str, Any]:
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
        "hidden_act": "gelu_pytorch_tanh" if m.activation == "geglu" else "silu",
        "attention_bias": m.bias,
        "mlp_bias": m.bias,
        "tie_word_embeddings": m.tied_embedding,
        "initializer_range": m.initial_deviation,
        "attention_dropout": 0.0,
    } | rope.to_hf(m)


def bert(m: schema.Model) -> dict[str, Any]:
    return {
        "architectures": ["BertForMaskedLM"],
        "num_hidden_layers": len(stacks(m)[-1].layers),
        "hidden_size": m.hidden_size,
        "num_attention_heads": m.heads,
        "intermediate_size": m.feed_forward_size,
        "max_position_embeddings": m.position_rows,
        "vocab_size": m.vocabulary_size,
        "layer_norm_eps": m.normalization_epsilon,
        "hidden_act": activation_name(m),
        "type_vocab_size": m.segments or 2,
        "tie_word_embeddings": m.tied_embedding,
        "initializer_range": m.initial_deviation,
        "hidden_dropout_prob": m.dropout,
        "attention_probs_dropout_prob": m.dropout,
    }


def t5(m: schema.Model) -> dict[str, Any]:
    counts = [len(stack.layers) for stack in stacks(m)]
    names = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "swiglu": "gated-silu"}
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
        "feed_forward_proj": names.get(m.activation, "gated-gelu"),
        "tie_word_embeddings": m.tied_embedding,
        "scale_decoder_outputs": m.output_scale is not None,
        "dropout_rate": m.dropout,
    }


def bart(m: schema.Model) -> dict[str, Any]:
    counts = [len(stack.layers) for stack in stacks(m)]
    config = {
        "architectures": ["BartForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder_layers": counts[0],
        "decoder_layers": counts[-1],
        "d_model": m.hidden_size,
        "max_position_embeddings": m.position_rows,
        "vocab_size": m.vocabulary_size,
        "activation_function": activation_name(m),
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
