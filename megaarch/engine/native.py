"""The engine of every layout that torch's own parallelism runs."""

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.distributed.mesh import AXES, GRADIENT, Grid
from megaarch.engine.base import Engine, Optimizer
from megaarch.model import TargetLosses, Transformer
from megaarch.parallel import compile, context_parallel, float8, fsdp, gradients
from megaarch.parallel.parallelize import build

# One entry a parameter: a pipeline rank, and another layout's parameter groups, take their own.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def step_if(finite: torch.Tensor, optimizer: Optimizer) -> None:
    """Takes the optimizer's step, which changes nothing where `finite` is false. torch's fused optimizers
    decide that on the device, by what its GradScaler sets; for others the host waits for it."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if finite:
            optimizer.step()
        return
    # torch's optimizers look for this attribute, which the class does not declare
    optimizer.found_inf = finite.logical_not().float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]


class NativeEngine(Engine):
    """torch's parallelism (megaarch/parallel). The model is built here unless it is given."""

    def __init__(self, settings: Settings, grid: Grid, model: Transformer | None = None):
        super().__init__(settings, grid, build(settings, grid) if model is None else model)
        self.pipeline = None
        self.compiled = compile.wanted(settings, grid.device)
        if grid.size("pp") > 1:
            from megaarch.parallel.pipeline_parallel import Pipeline

            self.pipeline = Pipeline(self.model, grid, settings, self.compiled)
        if self.compiled:
            compile.apply(self.model)

    def forward(self, batch: Batch, text_tokens: torch.Tensor | None = None) -> TargetLosses:
        batch = self._local(batch)
        float8.set_scales(self.model, self.settings.training)
        with compile.as_written(self.compiled):
            if self.pipeline is None:
                losses = self.model(batch, text_tokens)
            else:
                losses = self.pipeline.evaluate(batch, text_tokens)
        fsdp.release(self.model)
        if self.grid.size("cp") > 1:
            losses = context_parallel.gather(losses, self.grid)
        return losses

    def forward_backward(self, micro_batches: list[Batch], weight: float) -> torch.Tensor:
        batches = [self._local(batch) for batch in micro_batches]
        float8.set_scales(self.model, self.settings.training)
        if self.pipeline is not None:
            scale = self.grid.gradient_ranks / weight
            loss = self.pipeline.forward_backward(batches, scale) / weight
        else:
            loss = torch.zeros((), device=self.grid.device)
            for batch in batches:
                whole = not self.settings.parallel.gathers_again
                fsdp.before_backward(self.model, batch is batches[-1], whole)
                loss = loss + self._micro_step(batch, weight, self.model, torch.Tensor.backward)
        gradients.sum_summands(self.model)
        return self.grid.sum(loss, GRADIENT)

    def update(self, optimizer: Optimizer, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
        counts = self.pipeline.counts if self.pipeline else lambda name: True
        norm = gradients.total_norm([grad for name, grad in named if counts(name)], self.grid)
        if limit:
            gradients.scale([grad for _, grad in named], norm, limit)
        return norm

    def state(self, optimizer: Optimizer | None) -> tuple[dict, dict]:
        optimizers = [optimizer] if optimizer else []
        begun = optimizer is None or bool(optimizer.state)
        weights, state = get_state_dict(self.model, optimizers, options=BY_NAME)
        if optimizer is not None and not begun:  # torch has made it by a step without gradients
            for held in optimizer.state.values():
                if "step" in held:
                    held["step"].zero_()
        return float8.masters(weights), state

    def load_state(self, weights: dict, state: dict, optimizer: Optimizer | None) -> None:
        set_state_dict(
            self.model,
            [optimizer] if optimizer else [],
            model_state_dict=weights,
            optim_state_dict=state,
            options=BY_NAME,
        )
