"""T5: encoder-decoders with relative positions, RMSNorm and unscaled scores; 1.0 and v1.1."""

from typing import Any

from megaarch.attention.bias import bucket_fault
from megaarch.config.schema import Distance, Layers, Model, Number, Width
from megaarch.errors import UserError
from megaarch.interchange.family import Family, Key, Tensors, Used, activation, special_ids, under


def _read(c: Used) -> dict[str, Any]:
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
        "position_encoding": "relative",
        "activation": _activation(c),
        "attention_scale": 1.0,
        "tied_embedding": tied,
        "output_scale": c["d_model"] ** -0.5 if (tied if scaled is None else scaled) else None,
    }


def _activation(c: Used) -> str:
    words = c["feed_forward_proj"].split("-")
    if len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise UserError(f"megaarch cannot express feed_forward_proj {c['feed_forward_proj']!r}")
    gated = words[0] == "gated" if c["is_gated_act"] is None else c["is_gated_act"]
    if c["dense_act_fn"] is not None:
        return activation(c, "dense_act_fn", gated)
    name = "gelu_new" if c["feed_forward_proj"] == "gated-gelu" else words[-1]
    return activation(c, "feed_forward_proj", gated, name)


def _write(m: Model) -> dict[str, Any]:
    names = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "swiglu": "gated-silu"}
    return {
        "is_encoder_decoder": True,
        "feed_forward_proj": names.get(m.activation, "gated-gelu"),
        "tie_word_embeddings": m.tied_embedding,
        "scale_decoder_outputs": m.output_scale is not None,
        "dropout_rate": m.dropout,
    }


def _layer(stream: str, feed_forward: int) -> Tensors:
    dense = f"{feed_forward}.DenseReluDense"
    table: Tensors = {
        "attention_norm": "0.layer_norm",
        "attention.qkv": "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v",
        "attention.output": "0.SelfAttention.o",
        "cross_attention_norm": "1.layer_norm",
        "cross_attention.q": "1.EncDecAttention.q",
        "cross_attention.kv": "1.EncDecAttention.k 1.EncDecAttention.v",
        "cross_attention.output": "1.EncDecAttention.o",
        "feed_forward_norm": f"{feed_forward}.layer_norm",
        "feed_forward.gate_up": f"{dense}.wi_0 {dense}.wi_1",
        "feed_forward.up": f"{dense}.wi",
        "feed_forward.down": f"{dense}.wo",
    }
    return under(f"{stream}.block.{{i}}.layer.", table)


_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

T5 = Family(
    hf_class="T5ForConditionalGeneration",
    preset="t5",
    is_nearest=lambda m: m.architecture == "encoder_decoder" and m.position_encoding != "learned",
    keys={
        "vocab_size": Key(32128, Number, "vocabulary_size"),
        "d_model": Key(512, Width, "hidden_size", alias="hidden_size"),
        "d_kv": Key(64, Width, "head_size", alias="head_dim"),
        "d_ff": Key(2048, Number, "feed_forward_size"),
        "num_layers": Key(6, Layers, "layers", alias="num_hidden_layers"),
        "num_decoder_layers": Key(None, Layers, "decoder_layers", copied_from="num_layers"),
        "num_heads": Key(8, Width, "heads", alias="num_attention_heads"),
        "relative_attention_num_buckets": Key(32, Width, "relative_buckets"),
        "relative_attention_max_distance": Key(128, Distance, "relative_max_distance"),
        "layer_norm_epsilon": Key(1e-6, None, "normalization_epsilon"),
        "feed_forward_proj": Key("relu"),
        "dense_act_fn": Key(None),
        "is_gated_act": Key(None),
        "tie_word_embeddings": Key(True),
        "scale_decoder_outputs": Key(None),
    }
    | special_ids(pad=0, bos=None, eos=1),
    read=_read,
    write=_write,
    only={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    without_effect="dropout_rate initializer_factor classifier_dropout n_positions",
    once={
        "embedding": "shared",
        "relative_bias.encoder": _BIAS.format("encoder"),
        "relative_bias.decoder": _BIAS.format("decoder"),
        "encoder_norm": "encoder.final_layer_norm",
        "norm": "decoder.final_layer_norm",
        "output": "lm_head",
    },
    layers={"encoder": _layer("encoder", 1), "decoder": _layer("decoder", 2)},
    prefix="transformer.",
    always_tied=True,
    copies={
        "embedding.weight": (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        )
    },
    no_effect_tensors=(
        r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\."
        r"relative_attention_bias\.weight",
    ),
)
