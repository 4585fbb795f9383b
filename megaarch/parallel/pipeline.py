"""Pipeline parallelism: torch's schedules over the layers of one model (GPipe: Huang et al. 2019;
1F1B and interleaved: Narayanan et al. 2021; zero bubble: Qi et al. 2024).

A rank keeps one model: the layers of all its stages, under their global names, and the tables that
these need. Between stages go plain contiguous tensors of fixed shape: h from an encoder stage,
(memory, h) from a decoder stage. Tokens, parts and targets do not travel: every rank has the
micro-batches, and a stage looks one up by its index.

    stage 0       1          2               3
    embed 0..2 -h-> 3 -h-> norm, embed, 4..6 -(memory, h)-> 7, norm, head, loss

Legend: B rows, S tokens, D width, M targets, N micro-batches.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import pipelining
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import (
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.distributed.mesh import Grid
from megaarch.model import TargetLosses
from megaarch.model.loss import training_loss
from megaarch.parallel.stage_module import PartialTransformer, Received, prune
from megaarch.parallel.stages import Stages, is_v, needs
from megaarch.parallel.tied import Shared

__all__ = ["Engine", "PartialTransformer", "prune"]

SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
ONE_STAGE = ("gpipe", "1f1b")  # their schedules take a stage, the others a list


class Engine:
    """Runs steps and evaluations of a pruned model over the pipeline ranks of `grid`.

    Micro-batches come as the model of one rank takes them (context parallelism: its shards).
    Activations between stages have the dtype of the residual stream.
    A parameter that several ranks hold has the same gradient on all of them after
    `forward_backward`, and `counts` says on which one it counts in the clip norm.
    """

    def __init__(self, model: PartialTransformer, grid: Grid, settings: Settings):
        self.model, self.grid, self.settings = model, grid, settings
        self.group, self.rank = grid.group("pp"), grid.rank("pp")
        self.stages = Stages.of(settings)
        self.dtype = model.dtype
        self.width = model.settings.hidden_size
        self.parts = {stage: _Part(self, stage) for stage in self.stages.on(self.rank)}
        self.batches: list[Batch] = []
        self.scale, self.sums = 1.0, torch.zeros(0)
        self._schedule, self._scheduled = None, None
        self.shared = Shared(model, grid, self.stages)
        if isinstance(model, FSDPModule) and settings.parallel.schedule == "zero_bubble":
            model.set_reshard_after_forward(False)  # both backward passes want the same parameters

    def forward_backward(self, batches: list[Batch], scale: float | torch.Tensor) -> torch.Tensor:
        """Gradients of `scale` times the sum over all targets of these micro-batches of weighted
        loss and z-loss, in `.grad`, which must be empty ahead; reductions over data ranks done.

        Returns the sum of the weighted losses (nats; no scale, no z-loss), on every pipeline rank.
        """
        self.batches = [batch.to(self.grid.device) for batch in batches]
        self.scale = scale
        self.sums = torch.zeros(len(batches), dtype=self._loss_dtype, device=self.grid.device)
        self._hold_reductions()
        self._schedule_for(batches).step(target=torch.zeros(len(batches)), return_outputs=False)
        self._reduce()
        self.shared.add(self.model)
        self.batches = []
        loss = self.sums.sum()
        distributed.broadcast(loss, group=self.group, group_src=self.stages.ranks[-1])
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Batch, text_tokens: torch.Tensor | None = None) -> TargetLosses:
        """The losses of a batch of any shape, on every pipeline rank. Dropout is off.

        One batch leaves nothing to schedule: stages run one after another.
        """
        batch, training = batch.to(self.grid.device), self.model.training
        self.model.eval()
        received, losses = (), None
        for stage, owner in enumerate(self.stages.ranks):
            if owner == self.rank:
                received = self.parts[stage].run(batch, received, text_tokens)
                if stage + 1 == len(self.stages.ranks):
                    losses, received = received, ()
            received = self._hand_on(stage, batch, received)
        self.model.train(training)
        count = 2 + (text_tokens is not None)
        shape = (count, *batch.target_index.shape)
        figures = torch.empty(shape, dtype=self._loss_dtype, device=self.grid.device)
        if losses is not None:
            figures.copy_(torch.stack([x for x in losses if x is not None]))
        distributed.broadcast(figures, group=self.group, group_src=self.stages.ranks[-1])
        return TargetLosses(*figures)

    def counts(self, name: str) -> bool:
        """Whether this rank counts the parameter of this name in sums over pipeline ranks."""
        return name not in self.shared.counted_elsewhere

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _hand_on(
        self, stage: int, batch: Batch, tensors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Moves what `stage` made to the rank of the next one; returns what this rank then has."""
        ranks = (*self.stages.ranks, None)
        here, there = ranks[stage], ranks[stage + 1]
        if here == there or there is None or self.rank not in (here, there):
            return tensors
        if self.rank == here:
            for tensor in tensors:
                distributed.send(tensor, group=self.group, group_dst=there)
            return ()
        shapes = self._inputs(stage + 1, batch)
        tensors = tuple(torch.empty_like(x, device=self.grid.device) for x in shapes)
        for tensor in tensors:
            distributed.recv(tensor, group=self.group, group_src=here)
        return tensors

    def _inputs(self, stage: int, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Shapes and types, as meta tensors, of what `stage` receives."""
        first, boundary = self.stages.layers[stage].start, self.model.stacks[0].layers.stop
        streams = batch.streams[: (first > 0) + (first > boundary)]
        shards = self.grid.size("tp")  # sequence parallelism: a rank has its share of the tokens
        return tuple(
            torch.empty(
                (len(stream.tokens), stream.tokens.shape[1] // shards, self.width),
                dtype=self.dtype,
                device="meta",
                requires_grad=True,
            )
            for stream in streams
        )

    def _schedule_for(self, batches: list[Batch]) -> Any:
        """torch's schedule for so many micro-batches of this shape; made once."""
        shape = (len(batches), *(s.tokens.shape for s in batches[0].streams))
        if self._scheduled != shape:
            made = [
                _Stage(
                    part,
                    stage,
                    len(self.stages.layers),
                    self.grid.device,
                    input_args=self._inputs(stage, batches[0]),
                    output_args=self._outputs(stage, batches[0]),
                    group=self.group,
                )
                for stage, part in self.parts.items()
            ]
            name = self.settings.parallel.schedule
            kind = ScheduleZBVZeroBubble if is_v(self.settings) else SCHEDULES[name]
            self._schedule = kind(
                made[0] if name in ONE_STAGE else made,
                len(batches),
                loss_fn=lambda loss, _: loss,
                scale_grads=False,
            )
            self._scheduled = shape
        return self._schedule

    def _outputs(self, stage: int, batch: Batch) -> tuple[torch.Tensor, ...]:
        if stage + 1 < len(self.stages.layers):
            return self._inputs(stage + 1, batch)
        return (torch.empty((), dtype=self._loss_dtype, device="meta", requires_grad=True),)

    def _hold_reductions(self) -> None:
        """Gradients stay on the rank, and parameters gathered, until `_reduce`."""
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(False)
            self.model.set_reshard_after_backward(False)
            self.model.set_requires_gradient_sync(False)

    def _reduce(self) -> None:
        """Gradients reduced over the data ranks: torch's own way at the end of a schedule, on the
        whole model of the rank, since all of its stages share it."""
        if isinstance(self.model, FSDPModule):
            size = distributed.get_world_size(self.group)
            whole = pipelining.PipelineStage(
                self.model, self.rank, size, self.grid.device, group=self.group
            )
            whole.perform_reduce_grad(1)


class _Stage(pipelining.PipelineStage):
    """torch's stage, with two changes.

    It tells its part which micro-batch runs. And where a schedule splits the backward pass, the
    gradients of parameters outside the layers (embeddings, bias tables, the head) are made in the
    first half, with those of the inputs: torch's second half walks again whatever lies between the
    places that use a parameter, and fails where that is more than one layer's share.
    """

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.submod.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False
    ) -> tuple:
        if backward_type == "input":
            inputs = bwd_kwargs["input_values"]
            values = [*inputs, *self.submod.parameters(late=False)]
            bwd_kwargs = bwd_kwargs | {"input_values": values}
            grads, groups = super().backward_maybe_with_nosync("input", bwd_kwargs, last_backward)
            return grads[: len(inputs)], groups
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


class _Part(nn.Module):
    """One stage of an engine, as torch's schedules call it."""

    def __init__(self, engine: Engine, stage: int):
        super().__init__()
        self.engine, self.model = engine, engine.model
        self.layers = engine.stages.layers[stage]
        self.micro_batch = 0

    def parameters(self, recurse: bool = True, late: bool = True) -> Iterator[nn.Parameter]:
        """Of this stage alone, since a rank's stages share a model: those of its layers, for the
        late half of a split backward pass, or the others."""
        for name, parameter in self.model.named_parameters():
            here = needs(name, self.model.settings, self.layers)
            if here and late == name.startswith("layers."):
                yield parameter

    def forward(self, *received: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """What the next stage receives, or the scaled loss of the micro-batch."""
        batch = self.engine.batches[self.micro_batch]
        out = self.run(batch, tuple(Received.apply(x) for x in received))
        if not isinstance(out, TargetLosses):
            return out
        z_loss = self.engine.settings.training.z_loss
        nll, loss = training_loss(out, batch.target_weights, z_loss)
        self.engine.sums[self.micro_batch] = nll.detach()
        return loss * self.engine.scale

    def run(
        self,
        batch: Batch,
        received: tuple[torch.Tensor, ...],
        text_tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...] | TargetLosses:
        """As PartialTransformer.forward, with tensors that can be sent."""
        out = self.model(batch, self.layers, *received, text_tokens=text_tokens)
        if isinstance(out, TargetLosses):
            return out
        *memory, hidden = (x.contiguous() for x in out)
        # Memory that only passes through is the input; zero-bubble schedules detach outputs.
        return (*(x.clone() for x in memory), hidden)
