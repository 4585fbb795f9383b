"""Weights of GPT-2, Llama, BERT, T5 and BART, from Hugging Face and back: names and layouts.

A family is named as Hugging Face's `model_type` names it: gpt2, llama, bert, t5, bart.
"""

import re
from collections.abc import Mapping

import torch

from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.interchange.families import FAMILIES, Family
from megaarch.interchange.layouts import Layout
from megaarch.model.transformer import Transformer, stacks
from megaarch.training.faults import out_of_memory

Weights = dict[str, torch.Tensor]
_Names = dict[str, tuple[Layout, tuple[str, ...], tuple[str, ...]]]


def from_hf(weights: Mapping[str, torch.Tensor], model: schema.Model, family: str) -> Weights:
    """Our state dict, from a Hugging Face state dict of `family` ("gpt2", "llama", ...).

    A file's tensors, and what config.json says of ties, go through `ties.settle` first. ValueError
    names tensors that are missing, left over, of a wrong shape, or not the same where the model has
    one tensor for them.
    """
    table, shapes = _table(model, family), _shapes(model)
    _check_names(weights, table, family)
    ours = {}
    for name, (layout, names, _) in table.items():
        parts = [weights[n] for n in names]
        try:
            ours[name] = layout.fuse(parts, model).contiguous()
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            if out_of_memory(error):
                raise
            have = ", ".join(f"{n} {list(x.shape)}" for n, x in zip(names, parts, strict=True))
            raise UserError(
                f"{have} does not make {name}, which has {list(shapes[name])} in these model "
                f"settings: {str(error).splitlines()[0]}"
            ) from error
        if ours[name].shape != shapes[name]:
            raise UserError(
                f"{', '.join(names)} make {list(ours[name].shape)} of {name}, which has "
                f"{list(shapes[name])} in these model settings"
            )
    return ours


def _check_names(weights: Mapping[str, torch.Tensor], table: _Names, family: str) -> None:
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
            if name in weights and not torch.equal(weights[first], weights[name]):
                raise UserError(
                    f"the {family} weights {first} and {name} differ, and the model has one tensor"
                )


def to_hf(weights: Mapping[str, torch.Tensor], model: schema.Model, family: str) -> Weights:
    """A Hugging Face state dict of `family`, tied copies included, from ours."""
    theirs = {}
    tied = model.tied_embedding or FAMILIES[family].always_tied
    for ours, (layout, names, copies) in _table(model, family).items():
        tensors = layout.split(weights[ours], model)
        theirs |= {n: t.contiguous() for n, t in zip(names, tensors, strict=True)}
        for copy in copies:  # a tensor of its own where transformers would not tie it
            theirs[copy] = theirs[names[0]] if tied else theirs[names[0]].clone()
    return theirs


def without_effect(name: str, family: str) -> bool:
    """Whether no logit depends on a tensor of a file."""
    return any(re.fullmatch(pattern, name) for pattern in FAMILIES[family].without_effect)


def names_of(model: schema.Model, family: str) -> set[str]:
    """All names that a Hugging Face file may have for the model's tensors."""
    untied = model.model_copy(update={"tied_embedding": False})
    tables = FAMILIES[family]
    copies = {name for copies in tables.copies.values() for name in copies}
    return copies | {name for _, names, _ in _table(untied, family).values() for name in names}


def _shapes(model: schema.Model) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(model).named_parameters()}


def _table(model: schema.Model, family: str) -> _Names:
    """Each of our parameters: its layout, the names it is made of, further names of the same."""
    tables = FAMILIES[family]
    found = {}
    for name in _shapes(model):
        layout, names = _find(name, tables, model)
        copies = tables.copies.get(name, ())
        if name == "embedding.weight" and not model.tied_embedding:
            copies = tuple(copy for copy in copies if copy != tables.output)
        found[name] = layout, names, copies
    return found


def _find(name: str, family: Family, model: schema.Model) -> tuple[Layout, tuple[str, ...]]:
    table, index = family.once, ""
    key = name
    if name.startswith("layers."):
        _, number, key = name.split(".", 2)
        stack = next(s for s in stacks(model) if int(number) in s.layers)
        table, index = family.layers[stack.stream], str(int(number) - stack.layers.start)
    module, _, leaf = key.rpartition(".")
    if key in table:
        layout, names = table[key]
    elif module in table:
        layout, names = table[module]
        names = tuple(f"{n}.{leaf}" for n in names)
    else:
        raise UserError(f"{name} has no counterpart in this Hugging Face family")
    return layout, tuple(n.format(i=index) for n in names)
