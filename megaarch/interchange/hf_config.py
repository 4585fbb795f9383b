"""Model settings from a Hugging Face config.json, and back, for every family of families/.

Each key of a config.json is used, or has no effect on the logits, or is allowed one value and refused
with any other. Whatever else it has is refused by its name.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megaarch.config import schema
from megaarch.config.matmuls import head_size, key_heads
from megaarch.errors import UserError
from megaarch.interchange import rope
from megaarch.interchange.families import FAMILIES
from megaarch.interchange.family import Family, Id
from megaarch.model.transformer import stacks

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
# Of every family, besides its own:
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


def settings_from(config: Mapping) -> schema.Model:
    """Returns the model settings of a Hugging Face `config.json` (or `config.to_dict()`).

    What is missing has the value that transformers' config class gives it. Whether the output is
    tied to the embedding can depend on the weights too: `hf_weights.settle` says so in the config.

    UserError for a family that is none of ours, and for a key whose value megaarch cannot express,
    that is of a wrong type, or that is not known.
    """
    name = family_in(config)
    family, used = FAMILIES[name], complete(config, name)
    _check_sizes(used, family)
    try:
        return schema.Model(**_keys_to_settings(used, family) | family.read(used))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"this Hugging Face config makes model.{where} {fault['input']!r}: {fault['msg']}"
        ) from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"a value of this Hugging Face config has a wrong type: {error}") from error
    except ArithmeticError as error:
        raise UserError(f"a value of this Hugging Face config is out of range: {error}") from error


def family_in(config: Mapping) -> str:
    """Returns the family that a Hugging Face config names. UserError where it is none of ours."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    return family


def complete(config: Mapping, name: str) -> dict[str, Any]:
    """Returns the used keys of a config of this family, none missing, aliases resolved.

    UserError names a key that is not known here, or whose value changes the model in a way that
    megaarch cannot express.
    """
    family = FAMILIES[name]
    only, aliases = ONLY | family.only, family.aliases()
    known = {*WITHOUT_EFFECT, *family.without_effect.split(), *aliases}
    found = {key: entry.default for key, entry in family.keys.items()}
    for key, value in config.items():
        if key in only:
            if not any(value == allowed for allowed in only[key]):
                raise UserError(
                    f"megaarch cannot express {key}: {value!r} of this Hugging Face config"
                )
        elif key in found:
            found[key] = value
        elif key not in known:
            raise UserError(
                f"this Hugging Face config has {key}: {value!r}, and it is not known what that "
                "changes: take it out if it changes nothing"
            )
    for key, entry in family.keys.items():
        if entry.copied_from and found[key] is None:
            found[key] = found[entry.copied_from]
    return found | {aliases[key]: config[key] for key in config if key in aliases}


def _check_sizes(used: Mapping[str, Any], family: Family) -> None:
    """UserError names a key whose value is no whole number within the bounds of its kind, and heads
    that do not divide the width that they share."""
    for key, entry in family.keys.items():
        value = used[key]
        if entry.kind is None or (value is None and (entry.default is None or entry.kind is Id)):
            continue
        for one in value if key == "eos_token_id" and isinstance(value, list) else [value]:
            _check_size(key, one, entry.kind)
    heads, width, own = map(family.key_of, ("heads", "hidden_size", "head_size"))
    assert heads and width, "every family has heads and a width"
    if (own is None or used[own] is None) and used[width] % used[heads]:
        raise UserError(
            f"{heads} {used[heads]} of this Hugging Face config does not divide {width} {used[width]}"
        )


def _check_size(key: str, value: Any, kind: Any) -> None:
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        rules = TypeAdapter(kind).json_schema()
        least = rules["minimum"] if "minimum" in rules else rules["exclusiveMinimum"] + 1
        most = rules["maximum"]
        raise UserError(
            f"{key} of this Hugging Face config must be a whole number from {least} to {most:,}, not "
            f"{value!r:.60}"
        ) from None


def _keys_to_settings(used: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the settings that are keys by themselves."""
    first: dict[str, str] = {}
    for key, entry in family.keys.items():
        if entry.setting is None:
            continue
        one = first.setdefault(entry.setting, key)
        if one != key and used[one] != used[key]:
            raise UserError(
                f"{one} and {key} of this Hugging Face config differ; megaarch needs them equal"
            )
    return {setting: used[key] for setting, key in first.items()}


def config_for(model: schema.Model, name: str, position_axes: int = 1) -> dict[str, Any]:
    """Returns the `config.json` of a model in this family.

    UserError names every setting in which the family has no such model: the config is of one that
    comes near, and reading it back shows what differs.
    """
    family = FAMILIES[name]
    counts = [len(stack.layers) for stack in stacks(model)]
    ours = model.model_dump() | {
        "layers": counts[0],
        "encoder_layers": counts[0],
        "decoder_layers": counts[-1],
        "kv_heads": key_heads(model),
        "head_size": head_size(model),
    }
    config = {"architectures": [family.hf_class], "model_type": name}
    config |= {key: ours[entry.setting] for key, entry in family.keys.items() if entry.setting}
    config |= family.write(model)
    theirs = traits(settings_from(config))
    wrong = [
        f"model.{trait} is {value} and {name} has {theirs[trait]}"
        for trait, value in traits(model).items()
        if not _equal(value, theirs[trait]) and value not in family.same_weights
    ]
    if family.heads_divide_width and model.hidden_size % model.heads:
        wrong.append(f"its {model.heads} heads do not divide hidden_size {model.hidden_size}")
    if position_axes > 1:
        wrong.append(f"its positions have {position_axes} axes and {name}'s have one")
    if wrong:
        raise UserError(f"this is no {name} model: {'; '.join(wrong)}")
    return config


def family_of(model: schema.Model) -> str:
    """Returns the family that comes nearest to a model. UserError where there is none."""
    for name, family in FAMILIES.items():
        if family.is_nearest(model):
            return name
    raise UserError(f"no Hugging Face family here has the architecture {model.architecture}")


def traits(model: schema.Model) -> dict[str, Any]:
    """Maps what makes up a model to its value, with defaults filled in; None is what does not apply."""
    learned, relative, turned = (
        model.position_encoding == kind for kind in ("learned", "relative", "rope")
    )
    return {
        "architecture": model.architecture,
        "layers": [len(stack.layers) for stack in stacks(model)],
        "heads": model.heads,
        "kv_heads": key_heads(model),
        "head_size": head_size(model),
        "attention_scale": model.attention_scale or head_size(model) ** -0.5,
        "learned_positions": model.position_rows if learned else None,
        "position_offset": model.position_offset if learned else None,
        "rope_base": model.rope_base if turned else None,
        "rope_scaling": rope.trait(model),
        "relative_buckets": model.relative_buckets if relative else None,
        "relative_max_distance": model.relative_max_distance if relative else None,
    } | {name: getattr(model, name) for name in _PLAIN.split()}


_PLAIN = """
    hidden_size feed_forward_size vocabulary_size normalization normalization_position
    normalization_epsilon final_normalization position_encoding activation bias tied_embedding
    embedding_normalization output_scale segments head_transform output_bias
"""


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-9 * abs(ours)
    return ours == theirs
