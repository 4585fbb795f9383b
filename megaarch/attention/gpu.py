"""What a kernel's documented limits depend on, besides the shapes of its calls.

A kernel states them in `limit(gpu, head_size, parts)`, the first one that is broken as a sentence, or
None. It asks no device: tests call it for GPUs that are not there.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """capability: CUDA compute capability, (major, minor). cudnn: the version that torch loads,
    92000 for 9.20.0; 0: none. deterministic: an operation that is not must raise
    (torch.use_deterministic_algorithms without warn_only)."""

    capability: tuple[int, int]
    cudnn: int
    deterministic: bool = False


def describe(device: torch.device) -> Gpu:
    """The GPU, and what torch is set to, now."""
    return Gpu(
        torch.cuda.get_device_capability(device),
        torch.backends.cudnn.version() or 0,
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )
