"""Optimizers: torch's own, Adafactor, NVIDIA apex's fused Adam where it is installed.

To add one: a function like those here, and its entry among the OPTIMIZERS of config/catalogue.py.
"""

from typing import Any

import torch
from torch import nn

from megaarch.config.catalogue import OPTIMIZERS
from megaarch.config.registry import load
from megaarch.config.schema import Training
from megaarch.errors import UserError
from megaarch.model import Transformer
from megaarch.model.fused_projections import projections
from megaarch.training.adafactor import Adafactor

Groups = list[dict[str, Any]]  # torch.optim's parameter groups


def build(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimizer of `training.optimizer`. Matrices decay, vectors (norms, biases) do not. Parameters of
    a Transformer get an attribute `fused`, which says what projections they hold."""
    kinds: dict[tuple, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if isinstance(model, Transformer):
            p.fused = projections(name, model.settings)  # pyright: ignore[reportAttributeAccessIssue]
        if p.requires_grad:  # a fused kernel takes tensors of one device mesh
            axes = len(getattr(p, "ds_shape", p.shape))  # of ZeRO 3, which holds flat shards
            kinds.setdefault((axes < 2, str(getattr(p, "device_mesh", ""))), []).append(p)
    groups = [
        {"params": kinds[kind], "weight_decay": 0.0 if kind[0] else training.weight_decay}
        for kind in sorted(kinds)
    ]
    return load(OPTIMIZERS[training.optimizer].build)(groups, training)


def adamw(groups: Groups, training: Training) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **_adam(training), fused=True)


def apex_adam(groups: Groups, training: Training) -> torch.optim.Optimizer:
    return fused_adam()(groups, **_adam(training))


def _adam(training: Training) -> dict[str, Any]:
    betas = training.beta1, training.beta2
    return {"lr": training.learning_rate, "betas": betas, "eps": training.epsilon}


def adafactor(groups: Groups, training: Training) -> torch.optim.Optimizer:
    return Adafactor(groups, lr=training.learning_rate)


def sgd(groups: Groups, training: Training) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=training.learning_rate)


def fused_adam() -> type[torch.optim.Optimizer]:
    """NVIDIA apex's FusedAdam. UserError where apex is absent or another package has its name."""
    try:
        import apex  # pyright: ignore[reportMissingImports]  # on no package index
    except ImportError:
        raise UserError(
            "training.optimizer: apex_adam needs NVIDIA's apex, which is not installed: build it "
            "from its source (github.com/NVIDIA/apex), or use adamw, torch's fused AdamW"
        ) from None
    try:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"training.optimizer: the installed package apex ({getattr(apex, '__file__', None)}) "
            "is not NVIDIA's but an unrelated package of the same name: uninstall it and build "
            "NVIDIA's from source (github.com/NVIDIA/apex), or use adamw"
        ) from None
    if not torch.cuda.is_available():
        raise UserError("training.optimizer: apex_adam runs on CUDA only; use adamw")

    class Adam(FusedAdam):
        def zero_grad(self, set_to_none: bool = True) -> None:  # apex's takes no argument
            super().zero_grad()

    return Adam
