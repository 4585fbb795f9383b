"""torch.compile of a built model: each layer one graph, the head and the loss's chunks.

Layers of one kind share a graph, since their parameters are its inputs. Attention is one opaque
operator in it (attention/torch_operator.py). Evaluation runs uncompiled: its batches have other shapes, each
of which would compile the layers anew.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from megaarch.config.schema import Settings
from megaarch.model.loss import torch_slope
from megaarch.model.transformer import Transformer

BACKEND = "inductor"


def wanted(settings: Settings, device: torch.device) -> bool:
    """Whether a run on `device` compiles its model: as `training.compile` says or, where it is not set,
    on CUDA, unless the layout splits what a compiled graph keeps whole."""
    training, parallel = settings.training, settings.parallel
    if training.compile is not None:
        return training.compile
    splits = parallel.engine == "deepspeed" or parallel.splits_backward
    return device.type == "cuda" and not splits


def apply(model: Transformer) -> None:
    """Compiles in place what a training step runs of `model`. Apply it last: the hooks of FSDP run
    around a layer's graph."""
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=BACKEND, dynamic=False)
    model.before_output = _of_any_rows(torch.compile(model.before_output, backend=BACKEND))
    if model.slope is None:
        model.slope = torch.compile(torch_slope, backend=BACKEND, dynamic=True)


def _of_any_rows(compiled: Callable) -> Callable:
    """Lets the number of target rows change from batch to batch; all else is fixed."""

    def run(hidden_RD: torch.Tensor) -> torch.Tensor:
        torch._dynamo.maybe_mark_dynamic(hidden_RD, 0)
        return compiled(hidden_RD)

    return run


def as_written(compiled: bool) -> AbstractContextManager:
    """Returns a context in which compiled functions run uncompiled."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
