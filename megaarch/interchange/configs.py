"""The settings of GPT-2, Llama, BERT, T5 and BART models, from a Hugging Face config.json and back.

A family is named as Hugging Face's `model_type` names it: gpt2, llama, bert, t5, bart.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.interchange import from_config, rope, sizes, to_config
from megaarch.interchange.keys import FAMILY_KEYS, complete
from megaarch.model.layers import head_size, key_heads
from megaarch.model.transformer import stacks


def settings_from(config: Mapping) -> schema.Model:
    """The model settings of a Hugging Face `config.json` (or `config.to_dict()`).

    What is missing has the value that transformers' config class gives it. Whether the output is
    tied to the embedding can depend on the weights too: `ties.settle` says so in the config.

    ValueError for a family that is none of ours, and for a key whose value megaarch cannot express,
    that is of a wrong type, or that is not known.
    """
    family = family_in(config)
    used = complete(config, family)
    sizes.check(used, family)
    try:
        return schema.Model(**getattr(from_config, family)(used))
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"this Hugging Face config makes model.{name} {fault['input']!r}: {fault['msg']}"
        ) from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"a value of this Hugging Face config has a wrong type: {error}") from error
    except ArithmeticError as error:
        raise UserError(f"a value of this Hugging Face config is out of range: {error}") from error


def family_in(config: Mapping) -> str:
    """The family that a Hugging Face config names. ValueError where it is none of ours."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILY_KEYS:
        raise UserError(f"model_type {family!r} is not one of {', '.join(FAMILY_KEYS)}")
    return family


def config_for(model: schema.Model, family: str, position_axes: int = 1) -> dict[str, Any]:
    """The `config.json` of a model in this family.

    ValueError names every setting in which the family has no such model.
    """
    config = getattr(to_config, family)(model) | {"model_type": family}
    theirs = traits(settings_from(config))
    wrong = [
        f"model.{name} is {value} and {family} has {theirs[name]}"
        for name, value in traits(model).items()
        if not _equal(value, theirs[name])
        and not (family == "llama" and value == "prefix_decoder")  # the same weights
    ]
    if family == "llama" and model.hidden_size % model.heads:
        wrong.append(f"its {model.heads} heads do not divide hidden_size {model.hidden_size}")
    if position_axes > 1:
        wrong.append(f"its positions have {position_axes} axes and {family}'s have one")
    if wrong:
        raise UserError(f"this is no {family} model: {'; '.join(wrong)}")
    return config


def family_of(model: schema.Model) -> str:
    """The family that comes nearest to a model. ValueError where there is none."""
    positions = model.position_encoding
    if model.architecture in ("causal_decoder", "prefix_decoder"):
        return "gpt2" if positions == "learned" else "llama"
    if model.architecture == "encoder_decoder":
        return "bart" if positions == "learned" else "t5"
    if model.architecture == "encoder":
        return "bert"
    raise UserError(f"no Hugging Face family here has the architecture {model.architecture}")


def traits(model: schema.Model) -> dict[str, Any]:
    """What makes up a model, with defaults filled in and without what does not apply to it."""
    found = {
        "architecture": model.architecture,
        "layers": [len(stack.layers) for stack in stacks(model)],
        "heads": model.heads,
        "kv_heads": key_heads(model),
        "head_size": head_size(model),
        "attention_scale": model.attention_scale or head_size(model) ** -0.5,
        "learned_positions": model.position_rows if _learned(model) else None,
        "position_offset": model.position_offset if _learned(model) else None,
        "rope_base": model.rope_base if model.position_encoding == "rope" else None,
        "rope_scaling": rope.trait(model),
    }
    relative = model.position_encoding == "relative"
    for name in ("relative_buckets", "relative_max_distance"):
        found[name] = getattr(model, name) if relative else None
    for name in _PLAIN:
        found[name] = getattr(model, name)
    return found


_PLAIN = (
    "hidden_size",
    "feed_forward_size",
    "vocabulary_size",
    "normalization",
    "normalization_position",
    "normalization_epsilon",
    "final_normalization",
    "position_encoding",
    "activation",
    "bias",
    "tied_embedding",
    "embedding_normalization",
    "output_scale",
    "segments",
    "head_transform",
    "output_bias",
)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-9 * abs(ours)
    return ours == theirs


def _learned(model: schema.Model) -> bool:
    return model.position_encoding == "learned"
