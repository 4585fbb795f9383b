"""What the trainer and the yardsticks ask of an engine, which runs one copy of the model on whatever
ranks hold it.

Every rank of a copy gets the same micro-batches and ends with the same losses; no caller knows the
layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.distributed.mesh import Grid
from megaarch.model import TargetLosses, Transformer
from megaarch.model.loss import training_loss
from megaarch.parallel import context_parallel
from megaarch.parallel.precision import compute_dtype

Optimizer = torch.optim.Optimizer


class Engine(nn.Module, ABC):
    """`model` is this rank's part of the Transformer. Called, an engine scores a batch."""

    def __init__(self, settings: Settings, grid: Grid, model: Transformer):
        super().__init__()
        self.settings, self.grid, self.model = settings, grid, model
        model.compute_dtype = compute_dtype(settings)

    @abstractmethod
    def forward_backward(self, micro_batches: list[Batch], weight: float) -> torch.Tensor:
        """Adds up gradients of the mean loss over all ranks' targets, whose weights sum to `weight`;
        returns that loss (nats a target, z-loss left out), the same on every rank."""

    @abstractmethod
    def update(self, optimizer: Optimizer, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips and steps, unless loss or gradient is not finite, and drops the gradients. Returns
        the norm from before clipping, and whether the step was taken, both on the device."""

    @abstractmethod
    def forward(self, batch: Batch, text_tokens: torch.Tensor | None = None) -> TargetLosses:
        """Returns the losses of a batch's targets, all of them on every rank; without gradient where
        there is more than one. text_tokens: bool [vocabulary_size], or None."""

    @abstractmethod
    def state(self, optimizer: Optimizer | None) -> tuple[dict, dict]:
        """Returns weights and the optimizer's state by global name: what a checkpoint holds."""

    @abstractmethod
    def load_state(self, weights: dict, state: dict, optimizer: Optimizer | None) -> None:
        """Takes what `state` returned, read from a checkpoint."""

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        """Returns the optimizer that steps these parameters, given the one built for them."""
        return optimizer

    def shard(self, batch: Batch) -> Batch:
        """Returns what this rank's model takes of a batch, which may be that already. Host only."""
        last = batch.streams[-1]
        is_whole = last.tokens.shape[1] == last.parts.queries
        return context_parallel.local_batch(batch, self.grid) if is_whole else batch

    def _local(self, batch: Batch) -> Batch:
        return self.shard(batch).to(self.grid.device)

    def _micro_step(
        self,
        batch: Batch,
        weight: float,
        forward: Callable[[Batch], TargetLosses],
        backward: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        """Adds up the gradients of one micro-batch; returns its part of the mean loss. A function of
        its own, so that its graph is gone before the next micro-batch."""
        z_loss = self.settings.training.z_loss
        nll, loss = training_loss(forward(batch), batch.target_weights, z_loss)
        backward(loss * (self.grid.gradient_ranks / weight))
        return nll.detach() / weight
