"""The one rule of `training.precision`, for every layout (docs/parallelism.md)."""

import torch

from megaarch.config.schema import Settings


def compute_dtype(settings: Settings) -> torch.dtype | None:
    """Returns the dtype that layers compute in; None: their parameters'."""
    return torch.bfloat16 if settings.training.precision == "bf16" else None
