"""Hidden states of a model, layer by layer, and which slots of a stream hold a token."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch

from megaarch.data.batch import Batch, Stream
from megaarch.model.transformer import Transformer


@contextmanager
def recorded(model: Transformer) -> Iterator[dict[int, torch.Tensor]]:
    """Yields a dict that a forward pass fills: global layer index -> the layer's output [B, S, D]."""
    found: dict[int, torch.Tensor] = {}

    def keep(index: int, module, inputs, output):
        found[index] = output.detach()

    with ExitStack() as hooks:
        for name, layer in model.layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(keep, int(name))))
        yield found


def of_first_stack(model: Transformer, batch: Batch) -> list[torch.Tensor]:
    """Returns what each layer of the first stack leaves of a batch, [B, S, D] each: an encoder's, where
    there is one."""
    stack = model.stacks[0]
    with torch.no_grad(), recorded(model) as found:
        if len(model.stacks) == 1:
            model.run(batch)
        else:  # the decoder is not wanted
            model.run_layers(model.embed(0, batch), model.context(0, batch), stack.layers)
    return [found[index] for index in stack.layers]


def used_slots(stream: Stream) -> np.ndarray:
    """Returns whether each slot of a stream holds a token of an example, bool [B, S]."""
    used = np.zeros((len(stream.parts), stream.parts.queries), dtype=bool)
    for row, slots in enumerate(used):
        for _, start, end, _, _ in stream.parts.row(row):
            slots[start:end] = True
    return used
