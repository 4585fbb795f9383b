"""What one pipeline rank keeps of a model: its stages' layers, and the tables that these need."""

import torch
from torch import nn

from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.distributed.mesh import Grid
from megaarch.model import TargetLosses, Transformer
from megaarch.parallel.stages import Stages, needs, overlap


class PartialTransformer(Transformer):
    """What one pipeline rank keeps of a Transformer; made by `prune`. Names are global."""

    def forward(
        self,
        batch: Batch,
        layers: range,
        *received: torch.Tensor,
        text_tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...] | TargetLosses:
        """Of one stage: what the next one receives, (h,) or (memory, h), each [B, S, D], or the
        losses [B, M] if `layers` end with the model's last."""
        memory, hidden = (None, None, *received)[-2:]
        for index, stack in enumerate(self.stacks):
            mine = overlap(stack.layers, layers)
            if not mine:
                continue
            if mine.start == stack.layers.start:
                memory = None if hidden is None else self.to_memory(hidden)
                hidden = self.embed(index, batch)
            hidden = self.run(hidden, self.context(index, batch), mine, memory)
        if layers.stop == self.stacks[-1].layers.stop:
            return self.head(hidden, batch, text_tokens)
        return (hidden,) if memory is None else (memory, hidden)


def prune(model: Transformer, grid: Grid, settings: Settings) -> PartialTransformer:
    """Leaves in `model`, in place, what this rank's stages need, and returns it.

    All stages of a rank share it, so a tied embedding is one parameter on a rank. The model may be
    on meta and have its tensor plan; shard it afterwards. ConfigError for stages that do not fit.
    """
    stages = Stages.of(settings)
    mine = [stages.layers[stage] for stage in stages.on(grid.rank("pp"))]

    def kept(name: str) -> bool:
        return any(needs(name, model.settings, layers) for layers in mine)

    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleDict | nn.ParameterDict):
            for key in list(child.keys()):
                if not kept(f"{name}.{key}"):
                    del child[key]
        elif not kept(name):
            setattr(model, name, None)
    for name, _ in list(model.named_parameters(recurse=False)):
        if not kept(name):
            setattr(model, name, None)
    model.__class__ = PartialTransformer
    return model


class Received(torch.autograd.Function):
    """The identity; its gradient is contiguous, as sending requires."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()
