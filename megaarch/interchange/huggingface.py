"""Weights of GPT-2, Llama, BERT, T5 and BART, from Hugging Face and back: names and layouts.

A family is named as Hugging Face's `model_type` names it: gpt2, llama, bert, t5, bart.
"""

from collections.abc import Mapping

import torch

from megaarch import settings
from megaarch.interchange.families import FAMILIES, Family
from megaarch.interchange.layouts import Layout
from megaarch.model.transformer import Transformer, stacks
from megaarch.training.faults import out_of_memory

Weights = dict[str, torch.Tensor]
# Buffers, and heads for objectives that megaarch has not (BERT's next-sentence prediction).
IGNORED = (
    ".attn.bias",
    ".attn.masked_bias",
    ".position_ids",
    ".inv_freq",
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)


# What files that were saved from the bare model leave out ahead of its tensors, and what stands
# beside it.
PREFIXES = {"gpt2": "transformer.", "llama": "model.", "bert": "bert.", "bart": "model."}
BESIDE = ("lm_head.", "cls.", "final_logits_bias")


def current_names(weights: Weights, family: str) -> Weights:
    """The tensors under the names that `from_hf` knows: old files lack a prefix (gpt2's on the hub)
    or call a norm's weight and bias gamma and beta (BERT's)."""
    prefix = PREFIXES.get(family, "")
    if any(name.startswith(prefix) for name in weights):
        prefix = ""
    found = {}
    for name, tensor in weights.items():
        if name.endswith((".gamma", ".beta")):
            name = name.removesuffix(".gamma").removesuffix(".beta") + (
                ".weight" if name.endswith(".gamma") else ".bias"
            )
        found[name if name.startswith(BESIDE) else prefix + name] = tensor
    return found


def from_hf(weights: Mapping[str, torch.Tensor], model: settings.Model, family: str) -> Weights:
    """Our state dict, from a Hugging Face state dict of `family` ("gpt2", "llama", ...).

    ValueError names tensors that are missing, left over, or of a wrong shape.
    """
    table, shapes = _table(model, family), _shapes(model)
    known = {name for _, names, copies in table.values() for name in (*names, *copies)}
    missing = {name for _, names, _ in table.values() for name in names} - weights.keys()
    extra = [n for n in weights if n not in known and not n.endswith(IGNORED)]
    for names, what in (
        (sorted(missing), "lack"),
        (extra, "hold what the model has no place for:"),
    ):
        if names:
            raise ValueError(f"the {family} weights {what} {', '.join(names[:5])}")
    ours = {}
    for name, (layout, names, _) in table.items():
        parts = [weights[n] for n in names]
        try:
            ours[name] = layout.fuse(parts, model).contiguous()
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            if out_of_memory(error):
                raise
            have = ", ".join(f"{n} {list(x.shape)}" for n, x in zip(names, parts, strict=True))
            raise ValueError(
                f"{have} does not make {name}, which has {list(shapes[name])} in these model "
                f"settings: {str(error).splitlines()[0]}"
            ) from error
        if ours[name].shape != shapes[name]:
            raise ValueError(
                f"{', '.join(names)} make {list(ours[name].shape)} of {name}, which has "
                f"{list(shapes[name])} in these model settings"
            )
    return ours


def to_hf(weights: Mapping[str, torch.Tensor], model: settings.Model, family: str) -> Weights:
    """A Hugging Face state dict of `family`, tied copies included, from ours."""
    theirs = {}
    for ours, (layout, names, copies) in _table(model, family).items():
        tensors = layout.split(weights[ours], model)
        theirs |= {n: t.contiguous() for n, t in zip(names, tensors, strict=True)}
        theirs |= dict.fromkeys(copies, theirs[names[0]])
    return theirs


def _shapes(model: settings.Model) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(model).named_parameters()}


def _table(
    model: settings.Model, family: str
) -> dict[str, tuple[Layout, tuple[str, ...], tuple[str, ...]]]:
    """Each of our parameters: its layout, the names it is made of, further names of the same."""
    tables = FAMILIES[family]
    found = {}
    for name in _shapes(model):
        layout, names = _find(name, tables, model)
        copies = tables.copies.get(name, ())
        if name == "embedding.weight" and not model.tied_embedding:
            copies = copies[:-1]  # the last one is the output layer
        found[name] = layout, names, copies
    return found


def _find(name: str, family: Family, model: settings.Model) -> tuple[Layout, tuple[str, ...]]:
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
        raise ValueError(f"{name} has no counterpart in this Hugging Face family")
    return layout, tuple(n.format(i=index) for n in names)
