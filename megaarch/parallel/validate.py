"""Checks, before anything starts, that a layout fits the model and the processes."""

from collections.abc import Iterator

import torch

from megaarch.config import ConfigError
from megaarch.config.matmuls import key_heads
from megaarch.config.schema import Settings
from megaarch.distributed import launch
from megaarch.distributed.mesh import AXES, Grid, processes
from megaarch.model import padded_vocabulary
from megaarch.parallel import stages


def join(settings: Settings, device: torch.device) -> Grid:
    """Connects the processes that were started (launch.py) and returns their grid. ConfigError, before
    anything starts, where the layout does not fit."""
    check(settings, launch.find()[1].world_size)
    launch.join(device)
    return Grid.build(settings.parallel, device)


def check(settings: Settings, world_size: int) -> None:
    """Raises ConfigError with a sentence for each setting that does not fit."""
    problems = list(_problems(settings, world_size))
    if problems:
        raise ConfigError(problems)


def _problems(settings: Settings, world_size: int) -> Iterator[str]:
    model, parallel = settings.model, settings.parallel
    sizes = {name: getattr(parallel, name) for name in AXES.values()}
    product = processes(parallel)
    if product != world_size:
        given = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        started = "1 process was" if world_size == 1 else f"{world_size} processes were"
        if product == 1:
            yield (
                f"parallel: {started} started and the layout is of one: say how to use them, e.g. "
                f"parallel.data_parallel_shard={world_size}"
            )
        else:
            yield (
                f"parallel: the layout {given} needs {product} processes and {started} started: "
                f"start as many (torchrun --nproc-per-node {product}), or change the layout"
            )
    absent = [rank for rank in settings.logging.profile_ranks if rank >= world_size]
    if settings.logging.profile_from and absent:
        yield f"logging.profile_ranks: there is no rank {absent[0]}: the last one is {world_size - 1}"
    tensor, context = parallel.tensor_parallel, parallel.context_parallel
    among = f"tensor_parallel {tensor} x context_parallel {context}"
    if model.heads % (tensor * context):
        yield f"model.heads: {model.heads} heads do not divide among {among} ranks"
    keys = key_heads(model)
    if keys % tensor and tensor % keys:
        yield (
            f"model.kv_heads: {keys} key heads neither divide among {tensor} ranks "
            f"(parallel.tensor_parallel) nor {tensor} ranks among them"
        )
    for name, width in (
        ("feed_forward_size", model.feed_forward_size),
        ("vocabulary_size", padded_vocabulary(model.vocabulary_size)),
    ):
        if width % tensor:
            yield f"model.{name}: {width} does not divide among tensor_parallel {tensor} ranks"
    yield from stages.problems(settings)
    yield from _engine_problems(settings)


def _engine_problems(settings: Settings) -> Iterator[str]:
    training, parallel = settings.training, settings.parallel
    own = ("zero_stage", "offload", "deepspeed_config")
    given = [name for name in own if getattr(parallel, name) is not None]
    if parallel.engine == "torch":
        if training.optimizer == "apex_adam" and processes(parallel) > parallel.pipeline_parallel:
            yield (
                "training.optimizer: apex_adam takes whole parameters, and this layout divides them: use "
                "adamw, torch's fused AdamW, or parallel.engine=deepspeed"
            )
        for name in given:
            yield f"parallel.{name} is DeepSpeed's: set parallel.engine=deepspeed, or leave it out"
        return
    if parallel.deepspeed_config and len(given) > 1:
        yield f"parallel.{given[0]}: {parallel.deepspeed_config} says it, give one of the two"
    for axis in ("pp", "dp_replicate", "cp", "tp"):
        if (size := getattr(parallel, AXES[axis])) > 1:
            yield (
                f"parallel.{AXES[axis]}: {size} does not go with parallel.engine=deepspeed, which "
                "shards data alone (parallel.data_parallel_shard); use parallel.engine=torch"
            )
    if training.optimizer == "adafactor":
        yield (
            "training.optimizer: adafactor factors matrices and ZeRO flattens them: use adamw, or "
            "parallel.engine=torch"
        )
    if parallel.reshard_after_forward is not None:
        yield (
            "parallel.reshard_after_forward: under parallel.engine=deepspeed parallel.zero_stage says what "
            "is gathered again: leave it out, or use parallel.engine=torch"
        )
    if training.compile:
        yield "training.compile: not with parallel.engine=deepspeed; use parallel.engine=torch"
