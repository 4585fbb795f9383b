"""Every key that a Hugging Face config.json of our families may have, and what becomes of it.

A key is used (`defaults` has what transformers' config class takes where it is missing), or has no
effect on the logits (`without_effect`), or is allowed one value and refused with any other (`only`).
Whatever else a config has is refused by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megaarch.errors import UserError


@dataclass(frozen=True)
class Keys:
    """aliases: further names of a used key; transformers lets them win."""

    defaults: dict[str, Any]
    aliases: dict[str, str] = field(default_factory=dict)
    only: dict[str, tuple] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()


def complete(config: Mapping, family: str) -> dict[str, Any]:
    """The used keys of a config, none missing, aliases resolved.

    ValueError names a key that is not known here, or whose value changes the model in a way that
    megaarch cannot express.
    """
    keys = FAMILY_KEYS[family]
    only = ONLY | keys.only
    found = dict(keys.defaults)
    for key, value in config.items():
        if key in only:
            if not any(value == allowed for allowed in only[key]):
                raise UserError(
                    f"megaarch cannot express {key}: {value!r} of this Hugging Face config"
                )
        elif key in found:
            found[key] = value
        elif key not in keys.aliases and key not in keys.without_effect | WITHOUT_EFFECT:
            raise UserError(
                f"this Hugging Face config has {key}: {value!r}, and it is not known what that "
                "changes: take it out if it changes nothing"
            )
    if family == "t5" and found["num_decoder_layers"] is None:
        found["num_decoder_layers"] = found["num_layers"]  # ahead of the aliases, as T5Config does
    return found | {keys.aliases[key]: config[key] for key in config if key in keys.aliases}


_GENERATION = """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id
    force_bos_token_to_be_generated remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_lookbehind target_lookbehind num_beam_groups diversity_penalty task_specific_params
"""
_BOOKKEEPING = """
    model_type megaarch architectures transformers_version name_or_path _name_or_path _commit_hash
    dtype torch_dtype use_bfloat16 torchscript return_dict output_hidden_states output_attentions
    output_past use_cache attn_implementation _attn_implementation
    _attn_implementation_autoset gradient_checkpointing chunk_size_feed_forward problem_type
    id2label label2id num_labels _num_labels finetuning_task tokenizer_class prefix sep_token_id
    cls_token_id mask_token_id unk_token_id unsloth_version unsloth_fixed
"""
WITHOUT_EFFECT = frozenset((_GENERATION + _BOOKKEEPING).split())
ONLY = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
    "layer_types": (None,),
    "quantization_config": (None,),
    "auto_map": (None, {}),
}

FAMILY_KEYS = {
    "gpt2": Keys(
        defaults={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "decoder_start_token_id": None,
        },
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        only={"scale_attn_by_inverse_layer_idx": (False,)},
        without_effect=frozenset(
            [
                "is_decoder",
                "resid_pdrop",
                "embd_pdrop",
                "attn_pdrop",
                "initializer_range",
                "reorder_and_upcast_attn",
                "n_ctx",
                "predict_special_tokens",
                "summary_type",
                "summary_use_proj",
                "summary_activation",
                "summary_proj_to_labels",
                "summary_first_dropout",
            ]
        ),
    ),
    "llama": Keys(
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": None,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "rope_parameters": None,
            "partial_rotary_factor": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": None,
        },
        without_effect=frozenset(
            [
                "is_decoder",
                "initializer_range",
                "attention_dropout",
                "pretraining_tp",
                "max_sequence_length",
            ]
        ),
    ),
    "bert": Keys(
        defaults={
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            "decoder_start_token_id": None,
        },
        only={"is_decoder": (False,), "position_embedding_type": ("absolute",)},
        without_effect=frozenset(
            [
                "hidden_dropout_prob",
                "attention_probs_dropout_prob",
                "classifier_dropout",
                "initializer_range",
                "directionality",
                "pooler_fc_size",
                "pooler_num_attention_heads",
                "pooler_num_fc_layers",
                "pooler_size_per_head",
                "pooler_type",
            ]
        ),
    ),
    "t5": Keys(
        defaults={
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_decoder_layers": None,
            "num_heads": 8,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu",
            "dense_act_fn": None,
            "is_gated_act": None,
            "tie_word_embeddings": True,
            "scale_decoder_outputs": None,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            "decoder_start_token_id": None,
        },
        aliases={
            "hidden_size": "d_model",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
            "head_dim": "d_kv",
        },
        only={"is_encoder_decoder": (True,), "is_decoder": (False,)},
        without_effect=frozenset(
            ["dropout_rate", "initializer_factor", "classifier_dropout", "n_positions"]
        ),
    ),
    "bart": Keys(
        defaults={
            "vocab_size": 50265,
            "max_position_embeddings": 1024,
            "encoder_layers": 12,
            "encoder_ffn_dim": 4096,
            "encoder_attention_heads": 16,
            "decoder_layers": 12,
            "decoder_ffn_dim": 4096,
            "decoder_attention_heads": 16,
            "activation_function": "gelu",
            "d_model": 1024,
            "tie_word_embeddings": True,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        aliases={
            "num_attention_heads": "encoder_attention_heads",
            "hidden_size": "d_model",
            "num_hidden_layers": "encoder_layers",
        },
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
        without_effect=frozenset(
            [
                "encoder_layerdrop",
                "decoder_layerdrop",
                "dropout",
                "attention_dropout",
                "activation_dropout",
                "init_std",
                "classifier_dropout",
                "classif_dropout",
                "save_step",
            ]
        ),
    ),
}
