"""One copy of the model, on whatever ranks hold it: what the trainer and the yardsticks run.

Every rank of a copy gets the same micro-batches and ends with the same losses; no caller knows the
layout.
"""

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.distributed.mesh import AXES, GRADIENT, Grid
from megaarch.model import TargetLosses, Transformer
from megaarch.model.loss import training_loss
from megaarch.parallel import compile, float8, gradients
from megaarch.parallel.parallelize import build
from megaarch.parallel.precision import compute_dtype

# One entry a parameter: a pipeline rank, and another layout's parameter groups, take their own.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def step_if(finite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, which changes nothing where `finite` is false. torch's fused optimizers
    decide that on the device, by what its GradScaler sets; for others the host waits for it."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if finite:
            optimizer.step()
        return
    optimizer.found_inf = finite.logical_not().float()
    optimizer.step()
    del optimizer.found_inf


class Replica(nn.Module):
    """`model` is this rank's part of the Transformer, built here unless it is given. Called, it
    scores a batch."""

    def __init__(self, settings: Settings, grid: Grid, model: Transformer | None = None):
        super().__init__()
        self.settings, self.grid = settings, grid
        self.model = build(settings, grid) if model is None else model
        self.model.compute_dtype = compute_dtype(settings)
        self.engine = None
        if grid.size("pp") > 1:
            from megaarch.parallel.pipeline import Pipeline

            self.engine = Pipeline(self.model, grid, settings)
        self.compiled = compile.wanted(settings, grid.device)
        if self.compiled:
            compile.apply(self.model)

    def shard(self, batch: Batch) -> Batch:
        """What this rank's model takes of a batch, which may be that already. Host only."""
        last = batch.streams[-1]
        if self.grid.size("cp") > 1 and last.tokens.shape[1] == last.parts.queries:
            from megaarch.parallel import context

            return context.local_batch(batch, self.grid)
        return batch

    def adopt(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that steps these parameters, given the one built for them."""
        return optimizer

    def forward(self, batch: Batch, text_tokens: torch.Tensor | None = None) -> TargetLosses:
        """The losses of a batch's targets, all of them on every rank; without gradient where there
        is more than one. text_tokens: bool [vocabulary_size], or None."""
        batch = self._local(batch)
        float8.set_scales(self.model, self.settings.training)
        with compile.as_written(self.compiled):
            if self.engine is None:
                losses = self.model(batch, text_tokens)
            else:
                losses = self.engine.evaluate(batch, text_tokens)
        if self.grid.gradient_ranks > 1:
            from megaarch.parallel import fsdp

            fsdp.release(self.model)
        if self.grid.size("cp") > 1:
            from megaarch.parallel import context

            losses = context.gather(losses, self.grid)
        return losses

    def forward_backward(self, batches: list[Batch], weight: float) -> torch.Tensor:
        """Gradients of the mean loss over all ranks' targets, whose weights sum to `weight`;
        returns that loss (nats a target, z-loss left out), the same on every rank."""
        batches = [self._local(batch) for batch in batches]
        float8.set_scales(self.model, self.settings.training)
        if self.engine is not None:
            scale = self.grid.gradient_ranks / weight
            loss = self.engine.forward_backward(batches, scale) / weight
        else:
            loss = torch.zeros((), device=self.grid.device)
            for batch in batches:
                self._reduce_at(last=batch is batches[-1])
                loss = loss + self._micro_step(batch, weight)
        if self.grid.mesh is not None:
            gradients.reduce_partial(self.model.parameters())
        return self.grid.sum(loss, GRADIENT)

    def _micro_step(self, batch: Batch, weight: float) -> torch.Tensor:
        z_loss = self.settings.training.z_loss
        nll, loss = training_loss(self._losses(batch), batch.target_weights, z_loss)
        self._backward(loss * (self.grid.gradient_ranks / weight))
        return nll.detach() / weight

    def _losses(self, batch: Batch) -> TargetLosses:
        return self.model(batch)

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(
        self, optimizer: torch.optim.Optimizer, loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips and steps, unless loss or gradient is not finite, and drops the gradients. Returns
        the norm from before clipping, and whether the step was taken, both on the device."""
        norm = self.clip(self.settings.training.clip_gradient)
        # all ranks skip the same steps, though it be one rank's copy alone that went bad
        everywhere = torch.stack([loss.double(), norm.double()])
        self.grid.sum(everywhere, tuple(AXES))
        finite = torch.isfinite(everywhere).all()
        step_if(finite, optimizer)
        optimizer.zero_grad(set_to_none=True)
        return torch.where(finite, norm.double(), everywhere[1]), finite

    def clip(self, limit: float) -> torch.Tensor:
        """Scales gradients to a norm of at most `limit` (0: leaves them); returns the whole model's
        norm from before."""
        if self.grid.mesh is None:
            parameters = self.model.parameters()
            return nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        counts = self.engine.counts if self.engine else lambda name: True
        norm = gradients.total_norm([grad for name, grad in named if counts(name)], self.grid)
        if limit:
            gradients.scale([grad for _, grad in named], norm, limit)
        return norm

    def states(self, optimizer: torch.optim.Optimizer | None) -> tuple[dict, dict]:
        """Weights, and the optimizer's state, by global name: what a checkpoint holds."""
        optimizers = [optimizer] if optimizer else []
        weights, state = get_state_dict(self.model, optimizers, options=BY_NAME)
        return float8.masters(weights), state

    def put_states(
        self, weights: dict, state: dict, optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Takes what `states` gave, read from a checkpoint."""
        set_state_dict(
            self.model,
            [optimizer] if optimizer else [],
            model_state_dict=weights,
            optim_state_dict=state,
            options=BY_NAME,
        )

    def _local(self, batch: Batch) -> Batch:
        return self.shard(batch).to(self.grid.device)

    def _reduce_at(self, last: bool) -> None:
        if self.grid.gradient_ranks > 1 and not self.settings.parallel.reshard_after_forward:
            from megaarch.parallel import fsdp

            fsdp.reduce_at(self.model, last)
