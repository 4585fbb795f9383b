"""Weights from a Hugging Face file, and back, for every family of families/: names, layouts and ties.

Each tensor of a file is used, or has no effect on the logits, or is refused by its name.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from megaarch.checkpoint.lazy import Lazy, Weights, like
from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.interchange.families import FAMILIES
from megaarch.interchange.family import Family
from megaarch.interchange.hf_config import complete, family_in, settings_from
from megaarch.interchange.transforms import COPY, LAYOUTS, Transform
from megaarch.model.parameter_count import parameter_shapes
from megaarch.model.transformer import stacks

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_Sources = dict[str, str | None]  # a current name -> the file's; None: of zeros
_Names = dict[str, tuple[Transform, tuple[str, ...], tuple[str, ...]]]


def settle(weights: Weights, config: Mapping[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """Returns (tensors, config) for `from_hf` and `settings_from`: each tensor that counts, once and
    under its current name, and `tie_word_embeddings` as the tensors have it.

    Under `tie_word_embeddings` transformers 5 gives one tensor to all names of a tie where the file
    has one of them, and keeps apart those that the file has with other values, whatever config.json
    says. UserError names tensors whose values megaarch has no place for.
    """
    name, config = family_in(config), dict(config)
    family, used = FAMILIES[name], complete(config, name)
    model = settings_from(config)
    found: _Sources = _current_names(weights, model, name)
    tied = family.always_tied or used["tie_word_embeddings"]
    has_output = family.output in found
    if family.zero_if_missing:
        found.setdefault(family.zero_if_missing, None)
    for ours, copies in family.copies.items():
        first = family.hf_name(ours)
        if tied:
            _share(found, (first, *copies))
        inputs = [copy for copy in copies if copy != family.output]
        if inputs:
            _replace(found, weights, first, inputs, name)
    first = family.hf_name("embedding.weight")
    if family.always_tied:
        scaled = used["scale_decoder_outputs"]
        said = used["tie_word_embeddings"] is not False
        config["scale_decoder_outputs"] = said if scaled is None else scaled
        tied = said or not has_output
    if tied and first in found:
        tied = _equal(weights, found[first], found[family.output])
    if tied:
        found.pop(family.output, None)
    config["tie_word_embeddings"] = tied
    zeros, shapes = torch.zeros(1, model.vocabulary_size), like(weights)
    shapes = {n: shapes[old] if old else zeros.to("meta") for n, old in found.items()}

    def read(name: str) -> torch.Tensor:
        old = found[name]
        return weights[old] if old else zeros

    return Lazy(shapes, read), config


def _equal(weights: Weights, first: str | None, second: str | None) -> bool:
    """Whether two tensors of a file are equal."""
    return first == second or torch.equal(weights[str(first)], weights[str(second)])


def _share(found: _Sources, names: tuple[str, ...]) -> None:
    """Give the first of the names that is there to all that are not."""
    there = next((name for name in names if name in found), None)
    if there:
        for name in names:
            found.setdefault(name, found[there])


def _replace(found: _Sources, weights: Weights, first: str, inputs: list[str], family: str) -> None:
    """Put the tensor that is looked up, under its several names, in the place of `first`."""
    if not found.keys() & {first, *inputs}:
        return  # `from_hf` tells it
    missing = [name for name in (first, *inputs) if name not in found]
    if missing:
        raise UserError(f"the {family} weights lack {missing[0]}")
    sources = [found.pop(name) for name in inputs]
    for name, source in zip(inputs[1:], sources[1:], strict=True):
        if not _equal(weights, sources[0], source):
            raise UserError(
                f"the {family} weights {inputs[0]} and {name} differ, and megaarch has one embedding"
            )
    found[first] = sources[0]


def _current_names(weights: Weights, model: schema.Model, family: str) -> _Sources:
    """Old files lack the base model's prefix, or call a norm's weight and bias gamma and beta."""
    known, prefix = _all_names(model, family), FAMILIES[family].prefix
    found: _Sources = {}
    for name in weights:
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
            raise UserError(f"the {family} weights hold {current} twice: {found[current]}, {name}")
        found[current] = name
    return found


def from_hf(weights: Weights, model: schema.Model, family: str) -> Lazy:
    """Returns our state dict, from a Hugging Face state dict of `family` ("gpt2", "llama", ...); a tensor of it
    is made when it is looked up.

    A file's tensors, and what config.json says of ties, go through `settle` first. UserError
    names tensors that are missing, left over, of a wrong shape, or not the same where the model has
    one tensor for them.
    """
    table, shapes = _table(model, family), parameter_shapes(model, 1)
    _check_names(weights, table, family)
    given, ours = like(weights), {}

    def read(name: str, theirs: Weights = weights) -> torch.Tensor:
        layout, names, _ = table[name]
        return layout.fuse([theirs[n] for n in names], model).contiguous()

    for name, (_, names, _) in table.items():
        try:
            ours[name] = read(name, given)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            have = ", ".join(f"{n} {list(given[n].shape)}" for n in names)
            raise UserError(
                f"{have} does not make {name}, which has {list(shapes[name])} in these model "
                f"settings: {str(error).splitlines()[0]}"
            ) from error
        if ours[name].shape != shapes[name]:
            raise UserError(
                f"{', '.join(names)} make {list(ours[name].shape)} of {name}, which has "
                f"{list(shapes[name])} in these model settings"
            )

    return Lazy(ours, read)


def _check_names(weights: Weights, table: _Names, family: str) -> None:
    known = {name for _, names, copies in table.values() for name in (*names, *copies)}
    missing = {name for _, names, _ in table.values() for name in names} - weights.keys()
    extra = [n for n in weights if n not in known and not without_effect(n, family)]
    for names, what in (
        (sorted(missing), "lack"),
        (extra, "hold what the model has no place for:"),
    ):
        if names:
            raise UserError(f"the {family} weights {what} {', '.join(names[:5])}")
    for _, (first, *_), copies in table.values():
        for name in copies:
            if name in weights and not _equal(weights, first, name):
                raise UserError(
                    f"the {family} weights {first} and {name} differ, and the model has one tensor"
                )


def to_hf(weights: Weights, model: schema.Model, family: str) -> Lazy:
    """Returns a Hugging Face state dict of `family`, tied copies included, from ours; a tensor of it is made
    when it is looked up. What is tied is one tensor in `like`."""
    table, given = _table(model, family), like(weights)
    theirs: dict[str, torch.Tensor] = {}
    origin: dict[str, tuple[str, int]] = {}
    tied = model.tied_embedding or FAMILIES[family].always_tied
    for ours, (layout, names, copies) in table.items():
        for i, (name, part) in enumerate(zip(names, layout.split(given[ours], model), strict=True)):
            theirs[name], origin[name] = part.contiguous(), (ours, i)
        for copy in copies:  # a tensor of its own where transformers would not tie it
            theirs[copy] = theirs[names[0]] if tied else theirs[names[0]].clone()
            origin[copy] = origin[names[0]]

    # by the order of names o_proj stands between the parts of queries, keys and values
    @lru_cache(maxsize=2)
    def parts(ours: str) -> list[torch.Tensor]:
        return table[ours][0].split(weights[ours], model)

    def read(name: str) -> torch.Tensor:
        ours, i = origin[name]
        return parts(ours)[i].contiguous()

    return Lazy(theirs, read)


def without_effect(name: str, family: str) -> bool:
    """Whether no logit depends on a tensor of a file."""
    return any(re.fullmatch(pattern, name) for pattern in FAMILIES[family].no_effect_tensors)


def _all_names(model: schema.Model, family: str) -> set[str]:
    """Returns all names that a Hugging Face file may have for the model's tensors."""
    untied = model.model_copy(update={"tied_embedding": False})
    tables = FAMILIES[family]
    copies = {name for copies in tables.copies.values() for name in copies}
    return copies | {name for _, names, _ in _table(untied, family).values() for name in names}


def _table(model: schema.Model, family: str) -> _Names:
    """Maps each of our parameters to its layout, the names it is made of, and further names of the same."""
    tables = FAMILIES[family]
    found = {}
    for name in parameter_shapes(model, 1):
        layout, names = _find(name, tables, model)
        copies = tables.copies.get(name, ())
        if name == "embedding.weight" and not model.tied_embedding:
            copies = tuple(copy for copy in copies if copy != tables.output)
        found[name] = layout, names, copies
    return found


def _find(name: str, family: Family, model: schema.Model) -> tuple[Transform, tuple[str, ...]]:
    table, index = family.once, ""
    key = name
    if name.startswith("layers."):
        _, number, key = name.split(".", 2)
        stack = next(s for s in stacks(model) if int(number) in s.layers)
        table, index = family.layers[stack.stream], str(int(number) - stack.layers.start)
    module, _, leaf = key.rpartition(".")
    ours, end = (key, "") if key in table else (module, f".{leaf}")
    if ours not in table:
        raise UserError(f"{name} has no counterpart in this Hugging Face family")
    names = table[ours].format(i=index).split()
    layout = family.layouts.get(ours) or LAYOUTS.get(ours, COPY)
    return layout, tuple(theirs + end for theirs in names)
