"""Which tensors of a Hugging Face file count: their current names, and what transformers ties.

Under `tie_word_embeddings` transformers 5 gives one tensor to all names of a tie where the file has
one of them, and keeps apart those that the file has with other values, whatever config.json says.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.interchange.configs import family_in, settings_from
from megaarch.interchange.families import FAMILIES, Family
from megaarch.interchange.huggingface import Weights, names_of, without_effect
from megaarch.interchange.keys import complete

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def settle(weights: Weights, config: Mapping[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """(tensors, config) for `from_hf` and `settings_from`: each tensor that counts, once and under
    its current name, and `tie_word_embeddings` as the tensors have it.

    ValueError names tensors whose values megaarch has no place for.
    """
    family, config = family_in(config), dict(config)
    tables, used = FAMILIES[family], complete(config, family)
    model = settings_from(config)
    found = _current_names(weights, model, family)
    tied = tables.always_tied or used["tie_word_embeddings"]
    has_output = tables.output in found
    if family == "bart" and "final_logits_bias" not in found:
        found["final_logits_bias"] = torch.zeros(1, model.vocabulary_size)
    for ours, copies in tables.copies.items():
        first = _name(ours, tables)
        if tied:
            _share(found, (first, *copies))
        inputs = [copy for copy in copies if copy != tables.output]
        if inputs:
            _replace(found, first, inputs, family)
    first = _name("embedding.weight", tables)
    if family == "t5":
        scaled = used["scale_decoder_outputs"]
        said = used["tie_word_embeddings"] is not False
        config["scale_decoder_outputs"] = said if scaled is None else scaled
        tied = said or not has_output
    if tied and first in found:
        tied = torch.equal(found[first], found[tables.output])
    if tied:
        found.pop(tables.output, None)
    config["tie_word_embeddings"] = tied
    return found, config


def _name(ours: str, tables: Family) -> str:
    module, _, leaf = ours.rpartition(".")
    return f"{tables.once[module][1][0]}.{leaf}" if module else tables.once[ours][1][0]


def _share(found: Weights, names: tuple[str, ...]) -> None:
    """Give the first of the names that is there to all that are not."""
    there = next((name for name in names if name in found), None)
    if there:
        for name in names:
            found.setdefault(name, found[there])


def _replace(found: Weights, first: str, inputs: list[str], family: str) -> None:
    """Put the tensor that is looked up, under its several names, in the place of `first`."""
    if not found.keys() & {first, *inputs}:
        return  # `from_hf` tells it
    missing = [name for name in (first, *inputs) if name not in found]
    if missing:
        raise UserError(f"the {family} weights lack {missing[0]}")
    tensors = [found.pop(name) for name in inputs]
    for name, tensor in zip(inputs[1:], tensors[1:], strict=True):
        if not torch.equal(tensors[0], tensor):
            raise UserError(
                f"the {family} weights {inputs[0]} and {name} differ, and megaarch has one embedding"
            )
    found[first] = tensors[0]


def _current_names(weights: Weights, model: schema.Model, family: str) -> Weights:
    """Old files lack the base model's prefix, or call a norm's weight and bias gamma and beta."""
    known, prefix = names_of(model, family), FAMILIES[family].prefix
    found: Weights = {}
    origin: dict[str, str] = {}
    for name, tensor in weights.items():
        if without_effect(name, family):
            continue
        current = name
        for old, new in LEGACY.items():
            current = current.replace(old, new)
        if current.removeprefix(prefix) in known:
            current = current.removeprefix(prefix)
        elif prefix + current in known:
            current = prefix + current
        if current in found:
            raise UserError(f"the {family} weights hold {current} twice: {origin[current]}, {name}")
        found[current], origin[current] = tensor, name
    return found
