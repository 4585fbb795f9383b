"""Whether a model can be held at all, told ahead of building it."""

import os
from functools import lru_cache

import torch

from megaarch import catalogue
from megaarch.model.count import parameter_count
from megaarch.settings import Model, Settings

# fp32 numbers of each parameter besides itself and its gradient; adafactor's are its rows and columns
MOMENTS = {"adamw": 2, "apex_adam": 2, "sgd": 0, "adafactor": 0}
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def check(settings: Settings, device: torch.device) -> None:
    """ValueError where weights, gradients and moments of a rank's share alone take more memory than
    its device, or its machine, has. What passes may still run out of it: `megaarch dry-run` counts
    activations too."""
    need, there = least_bytes(settings), memory_of(device)
    if need > there:
        raise ValueError(
            f"model: this model needs {in_words(need)} a process for weights, gradients and "
            f"optimizer, and {device.type} has {in_words(there)}: lower model's sizes, or spread it "
            "over more processes (parallel)"
        )


def least_bytes(settings: Settings) -> float:
    """Bytes of a rank's share of the state at least: fp32, split evenly over all ranks that split it."""
    parallel = settings.parallel
    ranks = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.data_parallel_shard
    copies = 2 + MOMENTS[settings.training.optimizer]
    if parallel.engine == "deepspeed":  # stages and offload decide what else is held here
        ranks, copies = ranks * parallel.data_parallel_replicate, 1
    axes = catalogue.position_axes(settings.data.objective)
    return 4.0 * copies * parameters(settings.model, axes) / ranks


@lru_cache(maxsize=256)
def parameters(model: Model, axes: int) -> int:
    """As `parameter_count`, from models of one and two layers a stack: all layers of a stack are of
    one size, and a model of thousands takes long to build."""
    streams = catalogue.ARCHITECTURES[model.architecture].streams
    if len(streams) == 1:
        stacks = {"layers": model.layers}
    else:
        stacks = {
            "encoder_layers": model.encoder_layers or model.layers,
            "decoder_layers": model.decoder_layers or model.layers,
        }

    def count(**layers: int) -> int:
        given = dict.fromkeys(stacks, 1) | layers
        return parameter_count(model.model_copy(update=given), axes)

    least = count()
    return least + sum((n - 1) * (count(**{name: 2}) - least) for name, n in stacks.items())


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_words(size: float) -> str:
    """3.2e12 -> "3.2 TB"."""
    power = 0
    while size >= 1000 and power < len(UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:,.1f} {UNITS[power]}"
