"""Weights from one architecture to another: what each parameter of a model is read from.

A decoder gives an encoder-decoder both stacks, and its cross-attention the projections of
self-attention (T5Gemma: Zhang et al. 2025, arXiv:2504.06225). A model of one axis of
learned positions gives one of several its table; those of further axes begin at zero, so that the
model computes what it did.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

import torch

from megaarch.config.catalogue import position_axes
from megaarch.config.schema import Model, Settings
from megaarch.errors import UserError
from megaarch.model.fused_projections import projections
from megaarch.model.parameter_count import parameter_shapes
from megaarch.model.transformer import stacks

Value = TypeVar("Value")
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
_PART = re.compile(r"\.(q|kv)\.")
_OF_STREAM = re.compile(r"^(positions|embedding_norm)\.encoder\.")


@dataclass(frozen=True)
class Origin:
    """The parameter of the other model that a parameter is read from; of it the `rows` alone (int64),
    or all. name None: it begins at zero."""

    name: str | None
    rows: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        return self.name is not None and self.rows is None


Origins = dict[str, Origin]  # by parameter; one that is not there keeps its initial value


def origins(parent: Settings, child: Settings) -> Origins:
    """Returns where each parameter of a `child` model comes from. Shapes are the caller's to compare.
    UserError where the layers of a stack are not as many as those of the decoder that it comes from."""
    model, drawn = child.model, child.training.start_cross_attention == "random"
    shapes = parameter_shapes(model, position_axes(child.data.objective))
    *above, last = stacks(model)
    *others, only = stacks(parent.model)
    if not above or others or only.stream != last.stream:
        found = {name: Origin(name) for name in shapes}
    else:
        layers, each = len(only.layers), [len(stack.layers) for stack in stacks(model)]
        if any(number != layers for number in each):
            raise UserError(
                "a decoder's layers become those of each stack of an encoder-decoder, and there are "
                f"{layers} there and {' and '.join(map(str, each))} here: make them equal"
            )
        found = {name: _of_decoder(name, model, shapes) for name in shapes}
        if drawn:
            found = {name: o for name, o in found.items() if ".cross_attention" not in name}
    axes = position_axes(parent.data.objective)
    tables = [name for name in shapes if name.startswith("positions.")]
    new = {name: Origin(None) for name in tables if int(name.split(".")[2]) >= axes}
    return found | new


def renamed(found: Origins, of_parent: dict[str, Value]) -> dict[str, Value]:
    """Returns the parent's values (shapes, say) by the names of the parameters that take them whole; by
    their own those that none takes."""
    taken = {o.name for o in found.values()}
    named = {n: of_parent[o.name] for n, o in found.items() if o.whole and o.name in of_parent}
    return {n: value for n, value in of_parent.items() if n not in taken} | named


def _of_decoder(name: str, child: Model, shapes: dict[str, tuple[int, ...]]) -> Origin:
    """Returns the origin of an encoder-decoder's parameter in a decoder."""
    if not (layer := _LAYER.match(name)):
        return Origin(_OF_STREAM.sub(r"\1.decoder.", name).replace("encoder_norm.", "norm."))
    first = next(s.layers.start for s in stacks(child) if int(layer[1]) in s.layers)
    theirs = f"layers.{int(layer[1]) - first}.{layer[2].removeprefix('cross_')}"
    if not (part := _PART.search(theirs)):
        return Origin(theirs)
    theirs = theirs.replace(part[0], ".qkv.")  # its rows are queries, keys and values by turns
    kinds = projections(theirs, child).of_rows(range(shapes[theirs][0]))
    rows = kinds == 0 if part[1] == "q" else kinds > 0
    return Origin(theirs, rows.nonzero().flatten())
