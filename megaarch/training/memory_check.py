"""Whether a model can be held at all, told before building it, and where it turns out that it cannot."""

import os
import re

import torch

from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.distributed.mesh import processes
from megaarch.errors import UserError
from megaarch.model.parameter_count import parameter_count
from megaarch.model.transformer import stacks

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def check(settings: Settings, device: torch.device) -> None:
    """UserError where training cannot fit its device, or its machine."""
    check_training(settings, memory_of(device), device.type)


def check_training(settings: Settings, there: float, holder: str) -> None:
    """UserError where what a rank's share of training takes at least is more bytes than are `there`.
    What passes may still run out of memory: `megaarch dry-run` counts all of it. holder: who has it."""
    need = least_bytes(settings) + activation_bytes(settings)
    _require(need, there, holder, "weights, gradients, optimizer and the layers' inputs")


def check_weights(settings: Settings, device: torch.device) -> None:
    """UserError where the weights of a rank alone cannot fit its device, or its machine."""
    need = 4.0 * _parameters(settings) / _split(settings)
    _require(need, memory_of(device), device.type, "weights")


def _require(need: float, there: float, holder: str, what: str) -> None:
    if need > there:
        raise UserError(
            f"model: this model needs {in_words(need)} a process for {what}, and {holder} has "
            f"{in_words(there)}: lower model's sizes or training.micro_batch_size, or spread it over "
            "more processes (parallel)"
        )


def least_bytes(settings: Settings) -> float:
    """Bytes of a rank's share of the state at least: fp32, split evenly over all ranks that split it."""
    optimizer = catalogue.OPTIMIZERS[settings.training.optimizer]
    ranks, copies = _split(settings), 2 + optimizer.states  # the parameter and its gradient
    if settings.parallel.engine == "deepspeed":  # stages and offload decide what else is held here
        ranks, copies = ranks * settings.parallel.data_parallel_replicate, 1
    return 4.0 * copies * _parameters(settings) / ranks


def activation_bytes(settings: Settings) -> float:
    """Bytes of the inputs of a rank's layers, which the backward pass of a micro-batch takes whatever
    is recomputed."""
    model, parallel = settings.model, settings.parallel
    each = 2 if settings.training.precision == "bf16" else 4
    # a target length that is derived counts for nothing
    lengths = (model.sequence_length, model.target_length or 0)
    slots = sum(n * len(stack.layers) for n, stack in zip(lengths, stacks(model)))
    ranks = parallel.tensor_parallel * parallel.context_parallel * parallel.pipeline_parallel
    return each * settings.training.micro_batch_size * slots * model.hidden_size / ranks


def _split(settings: Settings) -> int:
    """Ranks that split a parameter at most: all but those of dp_replicate (parallel/fsdp.py)."""
    return processes(settings.parallel) // settings.parallel.data_parallel_replicate


def _parameters(settings: Settings) -> int:
    return parameter_count(settings.model, catalogue.position_axes(settings.data.objective))


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def out_of_memory(error: BaseException) -> str | None:
    """The sentence for a model that does not fit, or for a loader's process that the system has killed;
    None where the error is another."""
    text = str(error)
    if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", text):
        return (
            "a process that makes batches was killed, as the system does where a machine's memory is full: "
            "lower data.workers, or take more memory; the same command continues"
        )
    told = isinstance(error, MemoryError) or re.search(
        r"out of memory|can't allocate memory|Storage size calculation overflowed", text
    )
    if not told:
        return None
    amount = re.search(r"tried to allocate ([\d.]+) ?(\w+)", text, re.IGNORECASE)
    wanted = ""
    if amount:
        number, unit = float(amount[1]), amount[2]
        number, unit = (number / 2**30, "GiB") if unit == "bytes" else (number, unit)
        wanted = f" ({number:,.1f} {unit} more were asked for)"
    return (
        f"out of memory{wanted}: lower the model's sizes, training.micro_batch_size or "
        "model.sequence_length, or spread the model over more processes (parallel)"
    )


def in_words(size: float) -> str:
    """3.2e12 -> "3.2 TB"."""
    power = 0
    while size >= 1000 and power < len(UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:,.1f} {UNITS[power]}"
