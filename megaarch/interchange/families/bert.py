"""BERT: encoders with segments, a LayerNorm behind each branch, and a transform before the output."""

from typing import Any

from megaarch.config.schema import Count, Layers, Length, Model, Number, Width
from megaarch.errors import UserError
from megaarch.interchange.family import (
    Family,
    Key,
    Used,
    activation,
    activation_name,
    special_ids,
    under,
)


def _read(c: Used) -> dict[str, Any]:
    if c["type_vocab_size"] == 0:
        raise UserError("type_vocab_size of this Hugging Face config is 0: BERT needs segments")
    return {
        "architecture": "encoder",
        "normalization": "layernorm",
        "normalization_position": "post",
        "final_normalization": False,
        "position_encoding": "learned",
        "activation": activation(c, "hidden_act"),
        "bias": True,
        "embedding_normalization": True,
        "head_transform": True,
        "output_bias": True,
    }


def _write(m: Model) -> dict[str, Any]:
    return {
        "max_position_embeddings": m.position_rows,
        "hidden_act": activation_name(m),
        "type_vocab_size": m.segments or 2,
        "initializer_range": m.initial_deviation,
        "hidden_dropout_prob": m.dropout,
        "attention_probs_dropout_prob": m.dropout,
    }


BERT = Family(
    hf_class="BertForMaskedLM",
    preset="bert",
    is_nearest=lambda m: m.architecture == "encoder",
    keys={
        "vocab_size": Key(30522, Number, "vocabulary_size"),
        "hidden_size": Key(768, Width, "hidden_size"),
        "num_hidden_layers": Key(12, Layers, "layers"),
        "num_attention_heads": Key(12, Width, "heads"),
        "intermediate_size": Key(3072, Number, "feed_forward_size"),
        "hidden_act": Key("gelu"),
        "max_position_embeddings": Key(512, Length, "sequence_length"),
        "type_vocab_size": Key(2, Count, "segments"),
        "layer_norm_eps": Key(1e-12, None, "normalization_epsilon"),
        "tie_word_embeddings": Key(True, None, "tied_embedding"),
    }
    | special_ids(pad=0, bos=None, eos=None),
    read=_read,
    write=_write,
    only={"is_decoder": (False,), "position_embedding_type": ("absolute",)},
    without_effect="""
        hidden_dropout_prob attention_probs_dropout_prob classifier_dropout initializer_range
        directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
        pooler_size_per_head pooler_type
    """,
    once={
        "embedding": "bert.embeddings.word_embeddings",
        "positions.encoder.0": "bert.embeddings.position_embeddings",
        "segments": "bert.embeddings.token_type_embeddings",
        "embedding_norm.encoder": "bert.embeddings.LayerNorm",
        "head_transform.dense": "cls.predictions.transform.dense",
        "head_transform.norm": "cls.predictions.transform.LayerNorm",
        "output": "cls.predictions.decoder",
        "output_bias": "cls.predictions.bias",
    },
    layers={
        "encoder": under(
            "bert.encoder.layer.{i}.",
            {
                "attention.qkv": "attention.self.query attention.self.key attention.self.value",
                "attention.output": "attention.output.dense",
                "attention_norm": "attention.output.LayerNorm",
                "feed_forward.up": "intermediate.dense",
                "feed_forward.down": "output.dense",
                "feed_forward_norm": "output.LayerNorm",
            },
        )
    },
    prefix="bert.",
    copies={
        "embedding.weight": ("cls.predictions.decoder.weight",),
        "output_bias": ("cls.predictions.decoder.bias",),
    },
    no_effect_tensors=(
        r"(bert\.)?embeddings\.(position|token_type)_ids",
        r"(bert\.)?pooler\.dense\.(weight|bias)",  # of next-sentence prediction
        r"cls\.seq_relationship\.(weight|bias)",
    ),
)
