"""torch.compile of a built model: each layer one graph, the head and the loss's chunks.

Layers of one kind share a graph, since their parameters are its inputs. Attention is one opaque
operator in it (attention/operator.py).
"""

from dataclasses import replace

import torch

from megaarch.model.loss import torch_slope
from megaarch.model.transformer import Transformer


def apply(model: Transformer) -> None:
    """Compiles in place what a training step runs of `model`. Apply it last: hooks of sharding run
    around a layer's graph."""
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, dynamic=False)
    # the number of target rows changes from batch to batch
    model.before_output = torch.compile(model.before_output, dynamic=True)
    if model.layout.slope is None:
        slope = torch.compile(torch_slope, dynamic=True)
        model.layout = replace(model.layout, slope=slope)
