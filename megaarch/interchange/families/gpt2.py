"""GPT-2: decoders with learned positions, a LayerNorm before each branch, and transposed weights."""

from typing import Any

from megaarch.config.schema import Layers, Length, Model, Number, Width
from megaarch.interchange.family import (
    DECODERS,
    Family,
    Key,
    Used,
    activation,
    activation_name,
    special_ids,
    under,
)
from megaarch.interchange.transforms import TRANSPOSED, TRANSPOSED_HEADS


def _read(c: Used) -> dict[str, Any]:
    return {
        "architecture": "causal_decoder",
        "feed_forward_size": 4 * c["n_embd"] if c["n_inner"] is None else c["n_inner"],
        "normalization": "layernorm",
        "position_encoding": "learned",
        "activation": activation(c, "activation_function"),
        "bias": True,
        "attention_scale": None if c["scale_attn_weights"] else 1.0,
    }


def _write(m: Model) -> dict[str, Any]:
    return {
        "n_inner": m.feed_forward_size,
        "n_positions": m.position_rows,
        "activation_function": activation_name(m),
        "scale_attn_weights": m.attention_scale != 1.0,
        "initializer_range": m.initial_deviation,
    } | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), m.dropout)


GPT2 = Family(
    hf_class="GPT2LMHeadModel",
    preset="gpt",
    is_nearest=lambda m: m.architecture in DECODERS and m.position_encoding == "learned",
    keys={
        "vocab_size": Key(50257, Number, "vocabulary_size"),
        "n_positions": Key(1024, Length, "sequence_length", alias="max_position_embeddings"),
        "n_embd": Key(768, Width, "hidden_size", alias="hidden_size"),
        "n_layer": Key(12, Layers, "layers", alias="num_hidden_layers"),
        "n_head": Key(12, Width, "heads", alias="num_attention_heads"),
        "n_inner": Key(None, Number),
        "activation_function": Key("gelu_new"),
        "layer_norm_epsilon": Key(1e-5, None, "normalization_epsilon"),
        "scale_attn_weights": Key(True),
        "tie_word_embeddings": Key(True, None, "tied_embedding"),
    }
    | special_ids(pad=None, bos=50256, eos=50256),
    read=_read,
    write=_write,
    only={"scale_attn_by_inverse_layer_idx": (False,)},
    without_effect="""
        is_decoder resid_pdrop embd_pdrop attn_pdrop initializer_range reorder_and_upcast_attn n_ctx
        predict_special_tokens summary_type summary_use_proj summary_activation
        summary_proj_to_labels summary_first_dropout
    """,
    once={
        "embedding": "transformer.wte",
        "positions.decoder.0": "transformer.wpe",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    },
    layers={
        "decoder": under(
            "transformer.h.{i}.",
            {
                "attention_norm": "ln_1",
                "attention.qkv": "attn.c_attn",
                "attention.output": "attn.c_proj",
                "feed_forward_norm": "ln_2",
                "feed_forward.up": "mlp.c_fc",
                "feed_forward.down": "mlp.c_proj",
            },
        )
    },
    layouts={
        "attention.qkv": TRANSPOSED_HEADS,
        **dict.fromkeys(("attention.output", "feed_forward.up", "feed_forward.down"), TRANSPOSED),
    },
    prefix="transformer.",
    copies={"embedding.weight": ("lm_head.weight",)},
    no_effect_tensors=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
)
