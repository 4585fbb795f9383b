"""One table a Hugging Face family: which of their tensors make which of ours.

A table maps our name to a layout and their names. A name that ends in .weight or .bias is one
tensor; any other is a module, whose weight and bias go the same way. `{i}` is the layer's index in
its own stack.
"""

from dataclasses import dataclass

from megaarch.interchange.layouts import (
    COPY,
    GATED,
    HEADS,
    TRANSPOSED,
    TRANSPOSED_HEADS,
    VOCABULARY,
    VOCABULARY_ROW,
    Layout,
)

Table = dict[str, tuple[Layout, tuple[str, ...]]]


@dataclass(frozen=True)
class Family:
    """Tables for what stands once, and for a layer of each stream.

    prefix: of the base model's tensors, which files of a model without a head leave out.
    copies: our name -> their further names for the same tensor where config.json ties them, in the
    order in which transformers ties them. always_tied: whatever config.json says.
    without_effect: patterns of tensors that no logit depends on.
    """

    once: Table
    layers: dict[str, Table]
    prefix: str
    copies: dict[str, tuple[str, ...]]
    always_tied: bool = False
    without_effect: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The output layer's weight."""
        return f"{self.once['output'][1][0]}.weight"


def _table(prefix: str, table: Table) -> Table:
    return {
        ours: (layout, tuple(prefix + name for name in names))
        for ours, (layout, names) in table.items()
    }


GPT2 = Family(
    once={
        "embedding": (VOCABULARY, ("transformer.wte",)),
        "positions.decoder.0": (COPY, ("transformer.wpe",)),
        "norm": (COPY, ("transformer.ln_f",)),
        "output": (VOCABULARY, ("lm_head",)),
    },
    layers={
        "decoder": _table(
            "transformer.h.{i}.",
            {
                "attention_norm": (COPY, ("ln_1",)),
                "attention.qkv": (TRANSPOSED_HEADS, ("attn.c_attn",)),
                "attention.output": (TRANSPOSED, ("attn.c_proj",)),
                "feed_forward_norm": (COPY, ("ln_2",)),
                "feed_forward.up": (TRANSPOSED, ("mlp.c_fc",)),
                "feed_forward.down": (TRANSPOSED, ("mlp.c_proj",)),
            },
        )
    },
    prefix="transformer.",
    copies={"embedding.weight": ("lm_head.weight",)},
    without_effect=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
)

LLAMA = Family(
    once={
        "embedding": (VOCABULARY, ("model.embed_tokens",)),
        "norm": (COPY, ("model.norm",)),
        "output": (VOCABULARY, ("lm_head",)),
    },
    layers={
        "decoder": _table(
            "model.layers.{i}.",
            {
                "attention_norm": (COPY, ("input_layernorm",)),
                "attention.qkv": (
                    HEADS,
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ),
                "attention.output": (COPY, ("self_attn.o_proj",)),
                "feed_forward_norm": (COPY, ("post_attention_layernorm",)),
                "feed_forward.gate_up": (GATED, ("mlp.gate_proj", "mlp.up_proj")),
                "feed_forward.down": (COPY, ("mlp.down_proj",)),
            },
        )
    },
    prefix="model.",
    copies={"embedding.weight": ("lm_head.weight",)},
    without_effect=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)

BERT = Family(
    once={
        "embedding": (VOCABULARY, ("bert.embeddings.word_embeddings",)),
        "positions.encoder.0": (COPY, ("bert.embeddings.position_embeddings",)),
        "segments": (COPY, ("bert.embeddings.token_type_embeddings",)),
        "embedding_norm.encoder": (COPY, ("bert.embeddings.LayerNorm",)),
        "head_transform.dense": (COPY, ("cls.predictions.transform.dense",)),
        "head_transform.norm": (COPY, ("cls.predictions.transform.LayerNorm",)),
        "output": (VOCABULARY, ("cls.predictions.decoder",)),
        "output_bias": (VOCABULARY, ("cls.predictions.bias",)),
    },
    layers={
        "encoder": _table(
            "bert.encoder.layer.{i}.",
            {
                "attention.qkv": (
                    HEADS,
                    (
                        "attention.self.query",
                        "attention.self.key",
                        "attention.self.value",
                    ),
                ),
                "attention.output": (COPY, ("attention.output.dense",)),
                "attention_norm": (COPY, ("attention.output.LayerNorm",)),
                "feed_forward.up": (COPY, ("intermediate.dense",)),
                "feed_forward.down": (COPY, ("output.dense",)),
                "feed_forward_norm": (COPY, ("output.LayerNorm",)),
            },
        )
    },
    prefix="bert.",
    copies={
        "embedding.weight": ("cls.predictions.decoder.weight",),
        "output_bias": ("cls.predictions.decoder.bias",),
    },
    without_effect=(
        r"(bert\.)?embeddings\.(position|token_type)_ids",
        r"(bert\.)?pooler\.dense\.(weight|bias)",  # of next-sentence prediction
        r"cls\.seq_relationship\.(weight|bias)",
    ),
)


def _t5_layer(stream: str, feed_forward: int) -> Table:
    table = {
        "attention_norm": (COPY, ("0.layer_norm",)),
        "attention.qkv": (
            HEADS,
            ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
        ),
        "attention.output": (COPY, ("0.SelfAttention.o",)),
        "cross_attention_norm": (COPY, ("1.layer_norm",)),
        "cross_attention.q": (COPY, ("1.EncDecAttention.q",)),
        "cross_attention.kv": (HEADS, ("1.EncDecAttention.k", "1.EncDecAttention.v")),
        "cross_attention.output": (COPY, ("1.EncDecAttention.o",)),
        "feed_forward_norm": (COPY, (f"{feed_forward}.layer_norm",)),
        "feed_forward.gate_up": (
            GATED,
            (f"{feed_forward}.DenseReluDense.wi_0", f"{feed_forward}.DenseReluDense.wi_1"),
        ),
        "feed_forward.up": (COPY, (f"{feed_forward}.DenseReluDense.wi",)),
        "feed_forward.down": (COPY, (f"{feed_forward}.DenseReluDense.wo",)),
    }
    return _table(f"{stream}.block.{{i}}.layer.", table)


_T5_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

T5 = Family(
    once={
        "embedding": (VOCABULARY, ("shared",)),
        "relative_bias.encoder": (COPY, (_T5_BIAS.format("encoder"),)),
        "relative_bias.decoder": (COPY, (_T5_BIAS.format("decoder"),)),
        "encoder_norm": (COPY, ("encoder.final_layer_norm",)),
        "norm": (COPY, ("decoder.final_layer_norm",)),
        "output": (VOCABULARY, ("lm_head",)),
    },
    layers={"encoder": _t5_layer("encoder", 1), "decoder": _t5_layer("decoder", 2)},
    prefix="transformer.",
    always_tied=True,
    without_effect=(
        r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\."
        r"relative_attention_bias\.weight",
    ),
    copies={
        "embedding.weight": (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        )
    },
)

_BART_LAYER: Table = {
    "attention.qkv": (HEADS, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "attention.output": (COPY, ("self_attn.out_proj",)),
    "attention_norm": (COPY, ("self_attn_layer_norm",)),
    "cross_attention.q": (COPY, ("encoder_attn.q_proj",)),
    "cross_attention.kv": (HEADS, ("encoder_attn.k_proj", "encoder_attn.v_proj")),
    "cross_attention.output": (COPY, ("encoder_attn.out_proj",)),
    "cross_attention_norm": (COPY, ("encoder_attn_layer_norm",)),
    "feed_forward.up": (COPY, ("fc1",)),
    "feed_forward.down": (COPY, ("fc2",)),
    "feed_forward_norm": (COPY, ("final_layer_norm",)),
}

BART = Family(
    once={
        "embedding": (VOCABULARY, ("model.shared",)),
        "positions.encoder.0": (COPY, ("model.encoder.embed_positions",)),
        "positions.decoder.0": (COPY, ("model.decoder.embed_positions",)),
        "embedding_norm.encoder": (COPY, ("model.encoder.layernorm_embedding",)),
        "embedding_norm.decoder": (COPY, ("model.decoder.layernorm_embedding",)),
        "output": (VOCABULARY, ("lm_head",)),
        "output_bias": (VOCABULARY_ROW, ("final_logits_bias",)),
    },
    layers={
        stream: _table(f"model.{stream}.layers.{{i}}.", _BART_LAYER)
        for stream in ("encoder", "decoder")
    },
    prefix="model.",
    copies={
        "embedding.weight": (
            "lm_head.weight",
            "model.decoder.embed_tokens.weight",
            "model.encoder.embed_tokens.weight",
        )
    },
    without_effect=(r"(model\.)?(encoder|decoder)\.version",),
)

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT, "t5": T5, "bart": BART}
