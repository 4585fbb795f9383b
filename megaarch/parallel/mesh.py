"""The whole grid of processes: five axes, the innermost last, so that neighbours share a machine.

    pp            pipeline stages
    dp_replicate  copies of the parameters
    dp_shard      shards of one copy (FSDP)
    cp            shards of every row's tokens, all heads of attention exchanged (Ulysses)
    tp            shards of every layer's weights

Parameters are sharded over dp_shard and cp together (data.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megaarch.config import ConfigError
from megaarch.model import padded_vocabulary
from megaarch.parallel import launch, stages
from megaarch.settings import Parallel, Settings

AXES = {
    "pp": "pipeline_parallel",
    "dp_replicate": "data_parallel_replicate",
    "dp_shard": "data_parallel_shard",
    "cp": "context_parallel",
    "tp": "tensor_parallel",
}
DATA = ("dp_replicate", "dp_shard")  # ranks that read rows of their own
GRADIENT = (*DATA, "cp")  # ranks whose gradients are parts of one sum


def processes(parallel: Parallel) -> int:
    """How many processes a layout is of."""
    return math.prod(getattr(parallel, setting) for setting in AXES.values())


@dataclass(frozen=True)
class Grid:
    """This process's place among all. mesh: None where there is one process only."""

    device: torch.device
    mesh: DeviceMesh | None = None

    @classmethod
    def single(cls, device: torch.device | str) -> "Grid":
        """One process, without process groups."""
        return cls(torch.device(device))

    @classmethod
    def build(cls, parallel: Parallel, device: torch.device | str) -> "Grid":
        """The grid of the processes that `launch.join` brought together. Every process calls it."""
        sizes = tuple(getattr(parallel, setting) for setting in AXES.values())
        if math.prod(sizes) == 1:
            return cls.single(device)
        assert distributed.is_initialized(), "launch.join comes first"
        device = torch.device(device)
        return cls(device, init_device_mesh(device.type, sizes, mesh_dim_names=tuple(AXES)))

    @classmethod
    def join(cls, settings: Settings, device: torch.device) -> "Grid":
        """The grid of `settings`, of the processes that someone started for it (launch.py).
        ConfigError, before anything starts, where the layout does not fit."""
        check(settings, launch.find()[1].world_size)
        launch.join(device)
        return cls.build(settings.parallel, device)

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return 1 if self.mesh is None else self.mesh.size(list(AXES).index(axis))

    def rank(self, axis: str) -> int:
        """This process's place along an axis."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def world_size(self) -> int:
        """All processes."""
        return 1 if self.mesh is None else self.mesh.size()

    def group(self, axis: str) -> distributed.ProcessGroup | None:
        """The processes that differ from this one along `axis` alone; None where it has size 1."""
        return self.mesh.get_group(axis) if self.size(axis) > 1 else None

    def submesh(self, *axes: str) -> DeviceMesh:
        """The mesh of these axes, through this process."""
        assert self.mesh is not None, "one process has no mesh"
        return self.mesh[axes]

    @property
    def data_rank(self) -> int:
        """Which share of a step's rows this process reads."""
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def data_ranks(self) -> int:
        """Shares that a step's rows are dealt in."""
        return math.prod(self.size(axis) for axis in DATA)

    @property
    def gradient_ranks(self) -> int:
        """Ranks over which gradients are averaged."""
        return math.prod(self.size(axis) for axis in GRADIENT)

    @property
    def row_multiple(self) -> int:
        """Streams' lengths are multiples of this: tp and cp hold equal shards of a row's tokens."""
        return self.size("tp") * self.size("cp")

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.mesh is None or distributed.get_rank() == 0

    def sum(self, values: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
        """`values` summed in place over the ranks along `axes`."""
        for axis in axes:
            if group := self.group(axis):
                distributed.all_reduce(values, group=group)
        return values

    def share(self, value: Any, group: distributed.ProcessGroup | None = None) -> Any:
        """The main process's `value` (anything that pickles) on every process. group: of all
        processes, where it is not to be the default one."""
        if self.mesh is None:
            return value
        held = [value]
        distributed.broadcast_object_list(held, src=0, group=group)
        return held[0]

    def gather(self, value: Any, group: distributed.ProcessGroup | None = None) -> list[Any]:
        """Every process's `value`, on every process; otherwise as `share`."""
        if self.mesh is None:
            return [value]
        held = [None] * self.world_size
        distributed.all_gather_object(held, value, group=group)
        return held

    @property
    def host_group(self) -> distributed.ProcessGroup | None:
        """`launch.host_group` of these processes: for what may keep them waiting (files)."""
        return None if self.mesh is None else launch.host_group()

    def barrier(self) -> None:
        """Waits for every process."""
        if self.mesh is not None:
            distributed.barrier()


def check(settings: Settings, world_size: int) -> None:
    """ConfigError with every way in which the layout does not fit, before anything starts."""
    problems = list(_problems(settings, world_size))
    if problems:
        raise ConfigError(problems)


def _problems(settings: Settings, world_size: int) -> Iterator[str]:
    model, parallel = settings.model, settings.parallel
    sizes = {name: getattr(parallel, name) for name in AXES.values()}
    product = math.prod(sizes.values())
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
    tensor, context = parallel.tensor_parallel, parallel.context_parallel
    among = f"tensor_parallel {tensor} x context_parallel {context}"
    if model.heads % (tensor * context):
        yield f"model.heads: {model.heads} heads do not divide among {among} ranks"
    keys = model.kv_heads or model.heads
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
    if parallel.pipeline_parallel > 1:
        yield from stages.problems(settings)
    yield from _engine_problems(settings)


def _engine_problems(settings: Settings) -> Iterator[str]:
    training, parallel = settings.training, settings.parallel
    own = ("zero_stage", "offload", "deepspeed_config")
    given = [name for name in own if getattr(parallel, name) is not None]
    if parallel.engine == "torch":
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
    if training.compile:
        yield "training.compile: not with parallel.engine=deepspeed; use parallel.engine=torch"
