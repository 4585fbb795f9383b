"""Training end to end, as the trainer runs it by default, in steady state: tokens a second,
utilization by exact FLOPs, memory, and what would spoil them: waits for data, new graphs, slow kernels.

Alone (`train`, each preset in a process of its own, as its users run it) or on all processes of a
layout (`scaling`), where it also says what share of a step each rank spends in communication.
"""

import copy
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

# Imported before any trainer. An import in the midst of its constructor, where torch does it by
# itself, leaves cycles that hold the frames of all callers, the trainer and its model with them.
import torch._dynamo
from torch._C._autograd import DeviceType

from megaarch import config
from megaarch.attention import RelativeBias, choose
from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.data.loader import prefetch
from megaarch.distributed import launch
from megaarch.errors import UserError
from megaarch.ingest.prepare import prepare
from megaarch.model.layers import head_size, key_heads
from megaarch.parallel.validate import join
from megaarch.training.trainer import Trainer, device_of
from tools.throughput.isolate import OUT_OF_TIME, DeviceLost, expired, explain
from tools.throughput.record import Event, peak_flops
from tools.throughput.timing import Clock, Times

COLLECTIVES = ("nccl", "gloo", "c10d", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")
TWO_STACKS = ("encoder_layers", "decoder_layers", "target_length")


def of_preset(raw: config.Raw, preset: str) -> config.Raw:
    """Returns a copy for one preset, without a study."""
    mine = copy.deepcopy({name: section for name, section in raw.items() if name != "study"})
    config.set_path(mine, "model.preset", preset)
    return mine


def resolve(raw: config.Raw, preset: str) -> Settings:
    """The settings of a preset. What `raw` says of two stacks (model.encoder_layers, ...) holds for
    the encoder-decoders alone. ConfigError for what a person has got wrong."""
    mine = of_preset(raw, preset)
    # a budget decides how long a run is, and a benchmark decides that itself
    config.set_path(mine, "training.steps", 1 << 30)
    config.set_path(mine, "training.schedule", "constant")
    mine["training"].pop("budget", None)
    architecture = catalogue.ARCHITECTURES[catalogue.PRESETS[preset].architecture]
    if len(architecture.streams) == 1:
        for name in TWO_STACKS:
            mine["model"].pop(name, None)
    return config.resolve(config.fill_preset(mine))


def run(
    raw: config.Raw,
    presets: list[str],
    steps: int,
    warm_up: int,
    lost: Mapping[tuple, str],
    deadline: float | None,
) -> Iterator[Event]:
    """One result a preset, all of them on the same data, sizes and layout. Presets run one after
    the other, as the memory of all together is more than a device has; one that fails is reported.
    """
    for preset in presets:
        event = Event({"preset": preset})
        yield event
        if event.key in lost:
            yield event._replace(result={"wrong": lost[event.key]})
            continue
        if expired(deadline):
            yield event._replace(result={"unfinished": OUT_OF_TIME})
            continue
        settings = resolve(raw, preset)
        try:
            with TemporaryDirectory() as folder:
                logging = settings.logging.model_copy(update={"directory": folder})
                settings = settings.model_copy(update={"logging": logging})
                result = measure(settings, preset, steps, warm_up)
        except DeviceLost:
            raise
        except Exception as error:
            if launch.find()[1].world_size > 1:  # the other ranks wait for this one
                raise
            result = {"wrong": f"failed with {explain(error)}"}
        yield event._replace(result=result)


def measure(settings: Settings, preset: str, steps: int, warm_up: int) -> dict[str, Any]:
    """Timed steps of one model, after a warm-up that is left out. The trainer is freed with the
    last reference to it, which goes with this frame."""
    grid = join(settings, device_of(settings))
    prepared = launch.first(lambda: prepare(settings.data, settings.model.vocabulary_size))
    trainer = Trainer(settings, prepared, grid=grid)
    with prefetch(trainer.steps, 0, settings.data.workers) as batches:
        return _measured(trainer, batches, preset, steps, warm_up)


def _measured(
    trainer: Trainer, batches: Iterator, preset: str, steps: int, warm_up: int
) -> dict[str, Any]:
    device, settings = trainer.device, trainer.settings
    with_totals = trainer.with_totals(batches)
    for _ in range(warm_up):  # the allocator, compilation, plans and autotuning
        trainer.step(next(with_totals)[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, graphs = trainer.progress, compiled_graphs()
    waits, losses, kernels = [], [], {}
    clock = Clock(device, flush=False)
    clock.start()
    for _ in range(steps):
        started = time.perf_counter()  # a step waits for its batches
        made, total = next(with_totals)
        waits.append(time.perf_counter() - started)
        trainer.train_step(made, total, started)
        losses += [step.loss for step in trainer.read_steps(trainer.ahead)]
        clock.mark()
        for name, found in attention_kernels(settings, device, made).items():
            kernels[name] = kernels.get(name, Counter()) + found
    losses += [step.loss for step in trainer.read_steps()]
    times, after = Times(tuple(clock.intervals())), trainer.progress
    if not np.isfinite(losses).all():
        raise UserError(f"{preset}: a loss was not finite, so its speed says nothing: {losses}")
    ranks = trainer.grid.world_size
    return {
        "parameters": trainer.parameters,
        "ranks": ranks,
        "warm_up_steps": warm_up,
        "step": times.record(),
        **_rates(before, after, steps, times.median, ranks, device),
        **_peak_memory(device),
        "attention": settings.model.attention,
        "attention_kernels": {name: dict(found) for name, found in kernels.items()},
        "compiled": settings.training.compile,
        "float8": settings.training.float8,
        "graphs_compiled_in_timed_steps": compiled_graphs() - graphs,
        "wait_for_data": Times(tuple(waits)).record(),
        "wait_for_data_share": float(np.median(waits)) / times.median,
        "loss": losses[-1],
        "communication_share": communication(trainer, next(batches)) if ranks > 1 else 0.0,
    }


def _rates(
    before: Any, after: Any, steps: int, seconds: float, ranks: int, device: torch.device
) -> dict[str, Any]:
    """Tokens and FLOPs a second. seconds: a step."""
    tokens = (after.seen_tokens - before.seen_tokens) / steps / seconds
    targets = (after.target_tokens - before.target_tokens) / steps / seconds
    flops = (after.flops - before.flops) / steps / seconds
    peak, source = peak_flops(device)
    return {
        "tokens_per_second": tokens,
        "tokens_per_second_per_rank": tokens / ranks,
        "target_tokens_per_second": targets,
        "flops_per_second": flops,
        "utilization": flops / (peak * ranks),
        "peak_flops": peak,
        "peak_flops_from": source,
    }


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; each one more is a (re)compilation."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def attention_kernels(
    settings: Settings, device: torch.device, batches: list
) -> dict[str, Counter[str]]:
    """By stream, and by stream with ` cross`, which kernel `attend` chooses for its parts."""
    model, found = settings.model, {}
    dtype = torch.bfloat16 if settings.training.precision == "bf16" else torch.float32
    element = torch.empty((), device=device, dtype=dtype, requires_grad=True)
    names = catalogue.ARCHITECTURES[model.architecture].streams
    bias = None
    if model.position_encoding == "relative":
        table = torch.empty(model.relative_buckets, model.heads, device=device)
        bias = RelativeBias(table, True, model.relative_max_distance)
    for batch in batches:
        for name, stream in zip(names, batch.streams, strict=True):
            for label, parts, added in (
                (name, stream.parts, bias),
                (f"{name} cross", stream.cross, None),
            ):
                if parts is None:
                    continue
                q, k = (
                    element.expand(len(parts), length, heads, head_size(model))
                    for length, heads in (
                        (parts.queries, model.heads),
                        (parts.keys, key_heads(model)),
                    )
                )
                kernel, _ = choose(model.attention, q, k, parts, added)
                found.setdefault(label, Counter())[kernel] += 1
    return found


def communication(trainer: Trainer, batches: list) -> float:
    """The share of one step in which a collective ran, on this rank. Collectives that hide behind
    computation count in full: a high share is not yet a loss."""
    cuda = trainer.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=kinds) as profiler:
        step = trainer.step(batches)
    on_device = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
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


def _peak_memory(device: torch.device) -> dict[str, float]:
    """GiB: of a GPU what tensors took since the warm-up, and what the allocator held for them; of a
    CPU the process's largest size."""
    if device.type == "cuda":
        taken, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {
            "peak_memory_gib": round(taken / 2**30, 3),
            "peak_reserved_gib": round(held / 2**30, 3),
        }
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_memory_gib": round(largest / 2**30, 3)}


def line(r: dict[str, Any]) -> str:
    """A result for people."""
    if reason := r.get("wrong") or r.get("unfinished"):
        return f"{r['preset']:<10}{reason}"
    return (
        f"{r['preset']:<10}{r['parameters']:>14,} parameters {r['tokens_per_second']:>12,.0f} "
        f"tokens/s {r['utilization']:>7.1%} MFU {r['peak_memory_gib']:>8.2f} GiB "
        f"{r['communication_share']:>6.1%} communication {r['wait_for_data_share']:>6.1%} wait "
        f"{r['graphs_compiled_in_timed_steps']} graphs"
    )
