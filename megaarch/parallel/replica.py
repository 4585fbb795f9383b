"""One copy of the model, on whatever ranks hold it: what the trainer and the yardsticks run.

Every rank of a copy gets the same micro-batches and ends with the same losses; no caller knows the
layout.
"""

import torch
from torch import nn

from megaarch.data.batch import Batch
from megaarch.model.loss import TargetLosses
from megaarch.parallel import gradients
from megaarch.parallel.build import build
from megaarch.parallel.mesh import GRADIENT, Grid
from megaarch.settings import Settings


class Replica(nn.Module):
    """`model` is this rank's part of the Transformer. Called, it scores a batch."""

    def __init__(self, settings: Settings, grid: Grid):
        super().__init__()
        self.settings, self.grid = settings, grid
        self.model = build(settings, grid)
        self.engine = None
        half = settings.training.precision == "bf16"
        if grid.size("pp") > 1:
            from megaarch.parallel.pipeline import Engine

            self.engine = Engine(self.model, grid, settings, dtype=torch.bfloat16 if half else None)
        # where parameters are sharded they are gathered in bf16, and nothing is left to autocast
        self.autocast = half and grid.gradient_ranks == 1

    def forward(self, batch: Batch, text_tokens: torch.Tensor | None = None) -> TargetLosses:
        """The losses of a batch's targets, all of them on every rank; without gradient where there
        is more than one. text_tokens: bool [vocabulary_size], or None."""
        batch = self._local(batch)
        if self.engine is None:
            with self._autocast():
                losses = self.model(batch, text_tokens)
        else:
            losses = self.engine.evaluate(batch, text_tokens)
        if self.grid.gradient_ranks > 1:
            from megaarch.parallel import data

            data.release(self.model)
        if self.grid.size("cp") > 1:
            from megaarch.parallel import context

            losses = context.gather(losses, self.grid)
        return losses

    def forward_backward(self, batches: list[Batch], weight: float) -> torch.Tensor:
        """Gradients of the mean loss over all ranks' targets, whose weights sum to `weight`;
        returns that loss (nats a target, z-loss left out), the same on every rank."""
        batches = [self._local(batch) for batch in batches]
        if self.engine is not None:
            scale = self.grid.gradient_ranks / weight
            loss = self.engine.forward_backward(batches, scale) / weight
        else:
            loss = torch.zeros((), device=self.grid.device)
            for batch in batches:
                self._reduce_at(last=batch is batches[-1])
                loss = loss + self._micro_step(batch, weight)
        if self.grid.mesh is not None:
            gradients.settle(self.model.parameters())
        return self.grid.sum(loss, GRADIENT)

    def _micro_step(self, batch: Batch, weight: float) -> torch.Tensor:
        with self._autocast():
            out = self.model(batch)
        nll = (out.nll * batch.target_weights).sum() / weight
        penalized = nll
        if z_loss := self.settings.training.z_loss:  # PaLM, Chowdhery et al. 2022, section 5
            square = out.log_partition.square() * batch.target_weights
            penalized = nll + z_loss * square.sum() / weight
        (penalized * self.grid.gradient_ranks).backward()
        return nll.detach()

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

    def _local(self, batch: Batch) -> Batch:
        if self.grid.size("cp") > 1:
            from megaarch.parallel import context

            batch = context.local_batch(batch, self.grid)
        return batch.to(self.grid.device)

    def _reduce_at(self, last: bool) -> None:
        if self.grid.gradient_ranks > 1 and not self.settings.parallel.reshard_after_forward:
            from megaarch.parallel import data

            data.reduce_at(self.model, last)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.grid.device.type, torch.bfloat16, enabled=self.autocast)
