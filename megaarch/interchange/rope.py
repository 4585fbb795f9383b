"""Llama's RoPE parameters as a Hugging Face config spells them, and back.

Three spellings: `rope_theta` and `rope_scaling` beside each other (transformers 4, where `type` is
the older word for `rope_type`), and both in one `rope_parameters` (transformers 5).
"""

import math
from collections.abc import Mapping
from typing import Any

from megaarch.config import schema
from megaarch.errors import UserError

# Their key -> ours, of each kind that is a setting here.
FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
MSCALES = ("mscale", "mscale_all_dim")  # DeepSeek's way to give yarn's attention factor


def from_hf(config: Mapping) -> tuple[float, dict[str, Any] | None]:
    """rope_base and the fields of rope_scaling, of the used keys of a Llama config.

    UserError names a key that megaarch cannot express, or that is missing.
    """
    where = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    given = config[where] or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where} of this Hugging Face config is no object: {given!r}")
    parameters = {"rope_theta": config["rope_theta"], **given}
    partial = parameters.pop("partial_rotary_factor", config["partial_rotary_factor"])
    if partial not in (None, 1):
        raise UserError(f"megaarch cannot express partial_rotary_factor: {partial!r}")
    older = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", older)
    if not isinstance(kind, str) or kind not in FIELDS:
        raise UserError(f"megaarch cannot express {where}.rope_type: {kind!r}")
    base = parameters.pop("rope_theta")
    known = {*FIELDS[kind], *(MSCALES if kind == "yarn" else ())}
    for key, value in parameters.items():
        if key not in known and value is not None:
            raise UserError(
                f"this Hugging Face config has {where}.{key}: {value!r}, which rope_type {kind} does "
                "not take"
            )
    if kind == "default":
        return base, None
    return base, {"kind": kind} | _fields(config, kind, parameters, where)


def _fields(config: Mapping, kind: str, parameters: dict[str, Any], where: str) -> dict[str, Any]:
    longest = config["max_position_embeddings"]
    original = "original_max_position_embeddings"
    if original in FIELDS[kind]:
        outside = config[original]  # which transformers prefers
        parameters[original] = outside or parameters.get(original) or longest
    if kind == "yarn" and "factor" in parameters and parameters["factor"] is None:
        parameters["factor"] = longest / parameters[original]
    needed = {"factor"} if kind != "llama3" else set(FIELDS[kind])
    for key in sorted(needed):
        if parameters.get(key) is None:
            raise UserError(f"this Hugging Face config lacks {where}.{key}")
    if kind == "yarn":
        if parameters.get("attention_factor") is None:
            parameters["attention_factor"] = _by_mscale(parameters)
        if "truncate" in parameters:
            parameters["truncate"] = bool(parameters["truncate"])
        for name, usual in (("beta_fast", 32), ("beta_slow", 1)):
            parameters[name] = parameters.get(name) or usual
    found = {ours: parameters[key] for key, ours in FIELDS[kind].items() if key in parameters}
    return found | ({"original_length": longest} if kind == "dynamic" else {})


def _by_mscale(parameters: Mapping) -> float | None:
    scale, all_dim = (parameters.get(name) for name in MSCALES)
    if not scale or not all_dim:
        return None
    grown = math.log(max(parameters["factor"], 1))
    return (0.1 * scale * grown + 1) / (0.1 * all_dim * grown + 1)


def trait(model: schema.Model) -> dict[str, Any] | None:
    """The scaling's fields that its kind has."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    names = ["kind", "original_length", *FIELDS[scaling.kind].values()]
    return {name: getattr(scaling, name) for name in names}


def to_hf(model: schema.Model) -> dict[str, Any]:
    """The keys of a Llama config, in the spellings of transformers 4 and 5."""
    scaling, base = model.rope_scaling, model.rope_base
    if scaling is None:
        return {"rope_theta": base, "rope_parameters": {"rope_type": "default", "rope_theta": base}}
    found = {"rope_type": scaling.kind}
    for key, ours in FIELDS[scaling.kind].items():
        if (value := getattr(scaling, ours)) is not None:
            found[key] = value
    return {
        "rope_theta": base,
        "rope_scaling": found,
        "rope_parameters": found | {"rope_theta": base},
    }
