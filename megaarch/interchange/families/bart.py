"""BART: encoder-decoders with learned positions from 2 on and a LayerNorm behind each branch."""

from typing import Any

from megaarch.config.schema import Layers, Length, Model, Number, Width
from megaarch.interchange.family import (
    Family,
    Key,
    Tensors,
    Used,
    activation,
    activation_name,
    special_ids,
    under,
)
from megaarch.interchange.transforms import VOCABULARY_ROW


def _read(c: Used) -> dict[str, Any]:
    return {
        "architecture": "encoder_decoder",
        "normalization": "layernorm",
        "normalization_position": "post",
        "normalization_epsilon": 1e-5,
        "final_normalization": False,
        "position_encoding": "learned",
        "position_offset": 2,
        "activation": activation(c, "activation_function"),
        "bias": True,
        "embedding_normalization": True,
        "output_bias": True,
    }


def _write(m: Model) -> dict[str, Any]:
    return {
        "is_encoder_decoder": True,
        "max_position_embeddings": m.position_rows,
        "activation_function": activation_name(m),
        "scale_embedding": False,
        "init_std": m.initial_deviation,
        "forced_eos_token_id": None,
    } | dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), m.dropout)


_LAYER: Tensors = {
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross_attention.q": "encoder_attn.q_proj",
    "cross_attention.kv": "encoder_attn.k_proj encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
    "feed_forward_norm": "final_layer_norm",
}

BART = Family(
    hf_class="BartForConditionalGeneration",
    preset="bart",
    is_nearest=lambda m: m.architecture == "encoder_decoder" and m.position_encoding == "learned",
    keys={
        "vocab_size": Key(50265, Number, "vocabulary_size"),
        "max_position_embeddings": Key(1024, Length, "sequence_length"),
        "encoder_layers": Key(12, Layers, "encoder_layers", alias="num_hidden_layers"),
        "encoder_ffn_dim": Key(4096, Number, "feed_forward_size"),
        "encoder_attention_heads": Key(16, Width, "heads", alias="num_attention_heads"),
        "decoder_layers": Key(12, Layers, "decoder_layers"),
        "decoder_ffn_dim": Key(4096, Number, "feed_forward_size"),
        "decoder_attention_heads": Key(16, Width, "heads"),
        "activation_function": Key("gelu"),
        "d_model": Key(1024, Width, "hidden_size", alias="hidden_size"),
        "tie_word_embeddings": Key(True, None, "tied_embedding"),
    }
    | special_ids(pad=1, bos=0, eos=2, start=2),
    read=_read,
    write=_write,
    only={
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
        "scale_embedding": (False, None),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
        "add_final_layer_norm": (False,),
        "add_bias_logits": (False,),
        "static_position_embeddings": (False,),
        "extra_pos_embeddings": (2,),
    },
    without_effect="""
        encoder_layerdrop decoder_layerdrop dropout attention_dropout activation_dropout init_std
        classifier_dropout classif_dropout save_step
    """,
    once={
        "embedding": "model.shared",
        "positions.encoder.0": "model.encoder.embed_positions",
        "positions.decoder.0": "model.decoder.embed_positions",
        "embedding_norm.encoder": "model.encoder.layernorm_embedding",
        "embedding_norm.decoder": "model.decoder.layernorm_embedding",
        "output": "lm_head",
        "output_bias": "final_logits_bias",
    },
    layers={
        stream: under(f"model.{stream}.layers.{{i}}.", _LAYER) for stream in ("encoder", "decoder")
    },
    layouts={"output_bias": VOCABULARY_ROW},
    prefix="model.",
    zero_if_missing="final_logits_bias",
    copies={
        "embedding.weight": (
            "lm_head.weight",
            "model.decoder.embed_tokens.weight",
            "model.encoder.embed_tokens.weight",
        )
    },
    no_effect_tensors=(r"(model\.)?(encoder|decoder)\.version",),
)
