"""Pipeline parallelism: torch's schedules over the layers of one model (GPipe: Huang et al. 2019;
1F1B and interleaved: Narayanan et al. 2021; zero bubble: Qi et al. 2024).

A rank keeps one model: the layers of all its stages, under their global names, and the tables that
these need. Between stages go plain contiguous tensors of fixed shape: h from an encoder stage,
(memory, h) from a decoder stage. Tokens, parts and targets are not sent: every rank has the
micro-batches, and a stage looks one up by its index.

    stage 0       1          2               3
    embed 0..2 -h-> 3 -h-> norm, embed, 4..6 -(memory, h)-> 7, norm, head, loss
"""

from functools import partial
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
from megaarch.kernels.bindings import accumulator
from megaarch.model import TargetLosses, Transformer
from megaarch.model.loss import training_loss
from megaarch.parallel.stages import ONE_STAGE, Stages, is_v, needs
from megaarch.parallel.tied import TiedParameters

SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """Runs steps and evaluations over the pipeline ranks of `grid`. model: what `keep_stages` left of
    the Transformer on this rank. compiled: whether its layers compile as they first run.

    Micro-batches come as the model of one rank takes them (context parallelism: its shards).
    Activations between stages have the dtype of the residual stream.
    After `forward_backward` a parameter that several ranks hold has the same gradient on all of them;
    `counts` says on which one it counts in the gradient norm.
    """

    def __init__(self, model: Transformer, grid: Grid, settings: Settings, compiled: bool = False):
        self.model, self.grid, self.settings, self.compiled = model, grid, settings, compiled
        self.group, self.rank = grid.group("pp"), grid.rank("pp")
        self.stages = Stages.of(settings)
        self.modules = {s: _StageModule(self, s) for s in self.stages.on(self.rank)}
        self.batches: list[Batch] = []
        self.scale: float | torch.Tensor = 1.0
        self.sums = torch.zeros(0)
        self._schedule, self._shape = None, None
        self.tied = TiedParameters(model, grid, self.stages)
        if isinstance(model, FSDPModule) and settings.parallel.schedule == "zero_bubble":
            model.set_reshard_after_forward(False)  # both backward passes want the same parameters

    def forward_backward(self, batches: list[Batch], scale: float | torch.Tensor) -> torch.Tensor:
        """Computes the gradients of `scale` times the training loss, summed over all targets of these
        micro-batches, and reduces them over data ranks. `.grad` must be empty before.

        Returns the sum of the weighted losses (nats; no scale, no z-loss), on every pipeline rank.
        """
        self.batches = [batch.to(self.grid.device) for batch in batches]
        self.scale = scale
        self.sums = torch.zeros(len(batches), dtype=self._loss_dtype, device=self.grid.device)
        if self.compiled and self._shape is None:
            self._compile_stages()
        self._hold_reductions()
        self._schedule_for(batches).step(target=torch.zeros(len(batches)), return_outputs=False)
        self._reduce()
        self.tied.sum_gradients(self.model)
        self.batches = []
        loss = self.sums.sum()
        distributed.broadcast(loss, group=self.group, group_src=self.stages.ranks[-1])
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Batch, text_tokens: torch.Tensor | None = None) -> TargetLosses:
        """Returns the losses of a batch of any shape, on every pipeline rank. Dropout is off.

        One batch leaves nothing to schedule: stages run one after another, and each gives what it made to
        all ranks.
        """
        batch, training = batch.to(self.grid.device), self.model.training
        self.model.eval()
        given: tuple[torch.Tensor, ...] = ()
        loss = torch.empty(batch.target_index.shape, dtype=self._loss_dtype, device="meta")
        for stage, owner in enumerate(self.stages.ranks):
            is_last = stage + 1 == len(self.stages.ranks)
            shapes = [loss] * (2 + (text_tokens is not None))
            shapes = shapes if is_last else self._inputs(stage + 1, batch)
            made = tuple(torch.empty_like(x, device=self.grid.device) for x in shapes)
            if owner == self.rank:
                out = self.modules[stage].run(batch, given, text_tokens)
                for own, x in zip(made, (x for x in out if x is not None), strict=True):
                    own.copy_(x)
            for x in made:
                distributed.broadcast(x, group=self.group, group_src=owner)
            given = made
        self.model.train(training)
        return TargetLosses(*given)

    def counts(self, name: str) -> bool:
        """Whether this rank counts the parameter of this name in sums over pipeline ranks."""
        return name not in self.tied.counted_elsewhere

    @property
    def _loss_dtype(self) -> torch.dtype:
        return accumulator(self.model.dtype)

    def _inputs(self, stage: int, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Returns meta tensors of the shapes and types that `stage` receives."""
        first, boundary = self.stages.layers[stage].start, self.model.stacks[0].layers.stop
        streams = batch.streams[: (first > 0) + (first > boundary)]
        width = self.model.settings.hidden_size
        shards = self.grid.size("tp")  # sequence parallelism: a rank has its share of the tokens
        return tuple(
            torch.empty(
                (len(stream.tokens), stream.tokens.shape[1] // shards, width),
                dtype=self.model.dtype,
                device="meta",
                requires_grad=True,
            )
            for stream in streams
        )

    def _schedule_for(self, batches: list[Batch]) -> Any:
        """Returns torch's schedule for so many micro-batches of this shape; made once."""
        shape = (len(batches), *(s.tokens.shape for s in batches[0].streams))
        if self._shape != shape:
            stages = [
                _Stage(
                    module,
                    stage,
                    len(self.stages.layers),
                    self.grid.device,
                    input_args=self._inputs(stage, batches[0]),
                    output_args=self._outputs(stage, batches[0]),
                    group=self.group,
                )
                for stage, module in self.modules.items()
            ]
            name = self.settings.parallel.schedule
            kind = ScheduleZBVZeroBubble if is_v(self.settings) else SCHEDULES[name]
            self._schedule = kind(
                stages[0] if name in ONE_STAGE else stages,  # pyright: ignore[reportArgumentType]
                len(batches),
                loss_fn=lambda loss, _: loss,
                scale_grads=False,
            )
            self._shape = shape
        return self._schedule

    def _outputs(self, stage: int, batch: Batch) -> tuple[torch.Tensor, ...]:
        if stage + 1 < len(self.stages.layers):
            return self._inputs(stage + 1, batch)
        return (torch.empty((), dtype=self._loss_dtype, device="meta", requires_grad=True),)

    def _compile_stages(self) -> None:
        """Runs this rank's stages forward and backward on the first micro-batch, each on inputs of zeros, and
        drops the gradients. All ranks so compile at the same time: in a schedule each would wait for the
        stages before it to compile, and with many of them a message's time would be over."""
        self._hold_reductions()
        for stage, module in self.modules.items():
            module.micro_batch = 0
            shapes = self._inputs(stage, self.batches[0])
            zeros = partial(torch.zeros_like, device=self.grid.device, requires_grad=True)
            out = module(*map(zeros, shapes))
            ends = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            torch.autograd.backward(ends, [torch.zeros_like(x) for x in ends])
        self._reduce()
        self.model.zero_grad(set_to_none=True)

    def _hold_reductions(self) -> None:
        """Keeps gradients on the rank, and parameters gathered, until `_reduce`."""
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(False)
            self.model.set_reshard_after_backward(False)
            self.model.set_requires_gradient_sync(False)

    def _reduce(self) -> None:
        """Reduces gradients over the data ranks, as torch does at the end of a schedule.

        A rank's stages share one model, so torch's own call, which comes for each stage, would reduce
        once for each; its stages hold no FSDP module, and it does nothing. This stage, which never
        runs, holds the whole model. torch's function is called because it uses private parts of FSDP
        that differ between 2.11 and 2.13.
        """
        if isinstance(self.model, FSDPModule):
            size = distributed.get_world_size(self.group)
            whole = pipelining.PipelineStage(
                self.model, self.rank, size, self.grid.device, group=self.group
            )
            whole.perform_reduce_grad(1)


class _Stage(pipelining.PipelineStage):
    """torch's stage, with two changes.

    It tells its module which micro-batch runs. And where a schedule splits the backward pass, the
    gradients of parameters outside the layers (embeddings, bias tables, the head) are made in the
    first half, with those of the inputs: torch's second half walks again whatever lies between the
    places that use a parameter, and fails where that is more than one layer's share.
    """

    submod: "_StageModule"

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.submod.micro_batch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False
    ) -> tuple:
        if backward_type == "input":
            inputs = bwd_kwargs["input_values"]
            values = [*inputs, *self.submod.outside_layers()]
            bwd_kwargs = bwd_kwargs | {"input_values": values}
            grads, groups = super().backward_maybe_with_nosync("input", bwd_kwargs, last_backward)
            return grads[: len(inputs)], groups
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


class _StageModule(nn.Module):
    """One stage of a pipeline, as torch's schedules call it. Its submodules, hence its parameters, are
    its layers alone: those whose gradients the second half of a split backward pass makes."""

    def __init__(self, pipeline: Pipeline, stage: int):
        super().__init__()
        self.pipeline = pipeline
        self.layer_range = pipeline.stages.layers[stage]
        self.layers = nn.ModuleList(pipeline.model.layers[str(i)] for i in self.layer_range)
        self.micro_batch: Any = 0

    def outside_layers(self) -> list[nn.Parameter]:
        """Returns this stage's other parameters. A rank's stages share a model, so not all of it."""
        model = self.pipeline.model
        return [
            parameter
            for name, parameter in model.named_parameters()
            if not name.startswith("layers.") and needs(name, model.settings, self.layer_range)
        ]

    def forward(self, *received: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """Returns what the next stage receives, or the scaled loss of the micro-batch."""
        batch = self.pipeline.batches[self.micro_batch]
        out = self.run(batch, tuple(_ContiguousGradient.apply(x) for x in received))
        if not isinstance(out, TargetLosses):
            return out
        z_loss = self.pipeline.settings.training.z_loss
        nll, loss = training_loss(out, batch.target_weights, z_loss)
        self.pipeline.sums[self.micro_batch] = nll.detach()
        return loss * self.pipeline.scale

    def run(
        self,
        batch: Batch,
        received: tuple[torch.Tensor, ...],
        text_tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...] | TargetLosses:
        """As Transformer.forward of this stage's layers, with tensors that can be sent."""
        out = self.pipeline.model(batch, text_tokens, self.layer_range, received)
        if isinstance(out, TargetLosses):
            return out
        *memory, hidden = (x.contiguous() for x in out)
        # Memory that only passes through is the input; zero-bubble schedules detach outputs.
        return (*(x.clone() for x in memory), hidden)


class _ContiguousGradient(torch.autograd.Function):
    """The identity; its gradient is contiguous, as sending requires."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        return grad.contiguous()
