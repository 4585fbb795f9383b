"""Hidden states of a model, stack by stack, and which slots of a stream hold a token."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch

from megaarch.data.batch import Batch, Stream
from megaarch.model.layers import Context, Layer
from megaarch.model.transformer import Transformer


@torch.no_grad()
def states_by_stack(
    model: Transformer, batch: Batch, *, skip: bool = True, feed_forward: bool = True
) -> Iterator[list[torch.Tensor]]:
    """Yields the states of each stack, [B, S, D] each: of its embedding and behind each of its layers. A stack
    runs when it is asked for.

    skip, feed_forward: False for a model whose branches are not added to their inputs, and for one without
    feed-forward layers and their norms; its weights are untouched.
    """
    memory = None
    for index, stack in enumerate(model.stacks):
        context, states = model.context(index, batch), [model.embed(index, batch)]
        for number in stack.layers:
            layer = cast(Layer, model.layers[str(number)])
            if skip and feed_forward:
                states.append(layer(states[-1], context, memory))
            else:
                states.append(_switched(layer, states[-1], context, memory, skip, feed_forward))
        yield states
        memory = model.to_memory(states[-1])


def _switched(
    layer: Layer,
    x_BSD: torch.Tensor,
    context: Context,
    memory_BTD: torch.Tensor | None,
    skip: bool,
    feed_forward: bool,
) -> torch.Tensor:
    """What a layer makes of its input, in evaluation, without what is switched off."""
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


def used_slots(stream: Stream) -> np.ndarray:
    """Returns whether each slot of a stream holds a token of an example, bool [B, S]."""
    used = np.zeros((len(stream.parts), stream.parts.queries), dtype=bool)
    for row, slots in enumerate(used):
        for _, start, end, _, _ in stream.parts.row(row):
            slots[start:end] = True
    return used
