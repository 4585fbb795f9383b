"""A model with skip connections or feed-forward layers switched off, its weights untouched."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch

from megaarch.model.layers import Context, Layer
from megaarch.model.transformer import Transformer


@contextmanager
def switched(
    model: Transformer, *, skip: bool = True, feed_forward: bool = True
) -> Iterator[Transformer]:
    """Yields the model, whose branches are not added to their inputs without `skip`, and which leaves out
    feed-forward layers with their norms without `feed_forward`. In evaluation, of one process."""
    layers = cast(list[Layer], list(model.layers.values()))
    for layer in layers:
        layer.forward = partial(_forward, layer, skip, feed_forward)
    try:
        yield model
    finally:
        for layer in layers:
            del layer.forward


def _forward(
    layer: Layer,
    skip: bool,
    feed_forward: bool,
    x_BSD: torch.Tensor,
    context: Context,
    memory_BTD: torch.Tensor | None = None,
    dropout_key_B: torch.Tensor | None = None,
) -> torch.Tensor:
    assert dropout_key_B is None, "in evaluation nothing is dropped"
    branches = [(layer.attention_norm, lambda x: layer.attention(x, context))]
    if cross := layer.cross_attention:
        branches.append((layer.cross_attention_norm, lambda x: cross(x, memory_BTD, context)))
    if feed_forward:
        branches.append((layer.feed_forward_norm, layer.feed_forward))
    for norm, branch in branches:
        out = branch(norm(x_BSD) if layer.pre else x_BSD)
        out = x_BSD + out if skip else out
        x_BSD = out if layer.pre else norm(out)
    return x_BSD
