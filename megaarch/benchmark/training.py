"""Training end to end, as the trainer runs it: tokens a second, utilization by exact FLOPs, memory.

Alone (`train`) or on all processes of a layout (`scaling`), where it also says what share of a step
each rank spends in communication.
"""

import resource
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megaarch import config
from megaarch.benchmark.record import peak_flops
from megaarch.benchmark.timing import Times
from megaarch.data.loader import prefetch
from megaarch.data.prepare import prepare
from megaarch.parallel import launch
from megaarch.parallel.mesh import Grid
from megaarch.training.trainer import Trainer, device_of

WARM_UP = 3  # steps: the allocator, kernels compiled at first use, autotuning
COLLECTIVES = ("nccl", "gloo", "c10d", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def run(
    raw: config.Raw, presets: list[str], steps: int, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One record a preset, all of them on the same data, sizes and layout. Presets run one after
    the other, as the memory of all together is more than a device has."""
    found = []
    for preset in presets:
        mine = config.fill_preset(_with(raw, preset))
        settings = config.resolve(mine)
        with TemporaryDirectory() as folder:
            logging = settings.logging.model_copy(update={"directory": folder})
            found.append(measure(settings.model_copy(update={"logging": logging}), preset, steps))
        show(_line(found[-1]))
    return found


def _with(raw: config.Raw, preset: str) -> config.Raw:
    mine = {name: dict(section) for name, section in raw.items() if name != "study"}
    mine.setdefault("model", {})["preset"] = preset
    # a budget decides how long a run is, and a benchmark decides that itself
    mine["training"] = mine.get("training", {}) | {"steps": 1 << 30, "schedule": "constant"}
    mine["training"].pop("budget", None)
    return mine


def measure(settings, preset: str, steps: int) -> dict[str, Any]:
    """Timed steps of one model, after a warm-up that is left out."""
    grid = Grid.join(settings, device_of(settings))
    prepared = launch.first(lambda: prepare(settings.data, settings.model.vocabulary_size))
    trainer = Trainer(settings, prepared, grid=grid)
    with prefetch(trainer.steps, 0, settings.data.workers) as batches:
        return _measured(trainer, batches, preset, steps)


def _measured(trainer: Trainer, batches: Iterator, preset: str, steps: int) -> dict[str, Any]:
    device, settings = trainer.device, trainer.settings
    for _ in range(WARM_UP):
        trainer.train_step(next(batches))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = trainer.progress
    timed = []
    for _ in range(steps):
        started = time.perf_counter()  # a step waits for its batches
        timed.append(trainer.train_step(next(batches), started))
    after, losses = trainer.progress, [step.loss for step in timed]
    if not all(map(_finite, losses)):
        raise ValueError(f"{preset}: a loss was not finite, so its speed says nothing: {losses}")
    times = Times(tuple(step.seconds for step in timed))
    tokens = (after.seen_tokens - before.seen_tokens) / steps
    cost = (after.flops - before.flops) / steps
    peak, source = peak_flops(device)
    ranks = trainer.grid.world_size
    return {
        "preset": preset,
        "parameters": trainer.parameters,
        "ranks": ranks,
        "step": times.record(),
        "tokens_per_second": tokens / times.median,
        "tokens_per_second_per_rank": tokens / times.median / ranks,
        "target_tokens_per_second": (after.target_tokens - before.target_tokens)
        / steps
        / times.median,
        "flops_per_second": cost / times.median,
        "utilization": cost / times.median / (peak * ranks),
        "peak_flops": peak,
        "peak_flops_from": source,
        "peak_memory_gib": round(_peak_memory(device) / 2**30, 3),
        "attention": settings.model.attention,
        "loss": losses[-1],
        "communication_share": communication(trainer, next(batches)) if ranks > 1 else 0.0,
    }


def communication(trainer: Trainer, batches: list) -> float:
    """The share of one step in which a collective ran, on this rank. Collectives that hide behind
    computation count in full: a high share is not yet a loss."""
    cuda = trainer.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=kinds) as profiler:
        step = trainer.train_step(batches)
    on_device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == on_device and any(c in event.name.lower() for c in COLLECTIVES)
    ]
    return min(1.0, _union(spans) / 1e6 / step.seconds)


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


def _peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU what tensors took since the warm-up, of a CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _line(r: dict[str, Any]) -> str:
    return (
        f"{r['preset']:<10}{r['parameters']:>14,} parameters {r['tokens_per_second']:>12,.0f} "
        f"tokens/s {r['utilization']:>7.1%} MFU {r['peak_memory_gib']:>8.2f} GiB "
        f"{r['communication_share']:>6.1%} communication"
    )
