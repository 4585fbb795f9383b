"""Llama: decoders with RoPE, RMSNorm, gated units and grouped keys; prefix decoders have its weights."""

from typing import Any

from megaarch.config.schema import Layers, Length, Model, Number, Width
from megaarch.errors import UserError
from megaarch.interchange import rope
from megaarch.interchange.family import DECODERS, Family, Key, Used, activation, special_ids, under


def _read(c: Used) -> dict[str, Any]:
    heads, keys = c["num_attention_heads"], c["num_key_value_heads"]
    if keys is not None and heads % keys:
        raise UserError(
            f"num_key_value_heads {keys} of this Hugging Face config does not divide "
            f"num_attention_heads {heads}"
        )
    size = c["head_dim"] or c["hidden_size"] // heads
    if size % 2:
        raise UserError(f"head_dim of this Hugging Face config must be even for RoPE, not {size}")
    base, scaling = rope.from_hf(c)
    return {
        "architecture": "causal_decoder",
        "rope_base": base,
        "rope_scaling": scaling,
        "activation": activation(c, "hidden_act", gated=True),
    }


def _write(m: Model) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh" if m.activation == "geglu" else "silu",
        "initializer_range": m.initial_deviation,
        "attention_dropout": 0.0,
    } | rope.to_hf(m)


LLAMA = Family(
    hf_class="LlamaForCausalLM",
    preset="gpt",
    is_nearest=lambda m: m.architecture in DECODERS and m.position_encoding != "learned",
    same_weights=("prefix_decoder",),
    heads_divide_width=True,
    keys={
        "vocab_size": Key(32000, Number, "vocabulary_size"),
        "hidden_size": Key(4096, Width, "hidden_size"),
        "intermediate_size": Key(11008, Number, "feed_forward_size"),
        "num_hidden_layers": Key(32, Layers, "layers"),
        "num_attention_heads": Key(32, Width, "heads"),
        "num_key_value_heads": Key(None, Width, "kv_heads"),
        "head_dim": Key(None, Width, "head_size"),
        "hidden_act": Key("silu"),
        "max_position_embeddings": Key(2048, Length, "sequence_length"),
        "original_max_position_embeddings": Key(None, Length),
        "rms_norm_eps": Key(1e-6, None, "normalization_epsilon"),
        "rope_theta": Key(10000.0),
        "rope_scaling": Key(None),
        "rope_parameters": Key(None),
        "partial_rotary_factor": Key(None),
        "attention_bias": Key(False, None, "bias"),
        "mlp_bias": Key(False, None, "bias"),
        "tie_word_embeddings": Key(False, None, "tied_embedding"),
    }
    | special_ids(pad=None, bos=1, eos=2),
    read=_read,
    write=_write,
    without_effect="""
        is_decoder initializer_range attention_dropout pretraining_tp max_sequence_length
    """,
    once={"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"},
    layers={
        "decoder": under(
            "model.layers.{i}.",
            {
                "attention_norm": "input_layernorm",
                "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                "attention.output": "self_attn.o_proj",
                "feed_forward_norm": "post_attention_layernorm",
                "feed_forward.gate_up": "mlp.gate_proj mlp.up_proj",
                "feed_forward.down": "mlp.down_proj",
            },
        )
    },
    prefix="model.",
    copies={"embedding.weight": ("lm_head.weight",)},
    no_effect_tensors=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
