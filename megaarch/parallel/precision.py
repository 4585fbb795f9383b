"""What `training.precision` means, in every layout."""

import torch

from megaarch.config.schema import Settings


def compute_dtype(settings: Settings) -> torch.dtype | None:
    """What layers compute in, by `training.precision`; None: their parameters' dtype."""
    return torch.bfloat16 if settings.training.precision == "bf16" else None
