"""The grid of all processes: five axes, the innermost last, so that neighbours share a machine.

    pp            pipeline stages
    dp_replicate  copies of the parameters
    dp_shard      shards of one copy (FSDP)
    cp            shards of every row's tokens, all heads of attention exchanged (Ulysses)
    tp            shards of every layer's weights

Parameters are sharded over dp_shard and cp together (parallel/fsdp.py).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megaarch.config.schema import Parallel
from megaarch.distributed import launch

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
    """Returns how many processes a layout has."""
    return math.prod(getattr(parallel, setting) for setting in AXES.values())


@dataclass(frozen=True)
class Grid:
    """The grid as this process sees it. mesh: None where there is one process only."""

    device: torch.device
    mesh: DeviceMesh | None = None

    @classmethod
    def single(cls, device: torch.device | str) -> "Grid":
        """Returns the grid of one process, without process groups."""
        return cls(torch.device(device))

    @classmethod
    def build(cls, parallel: Parallel, device: torch.device | str) -> "Grid":
        """Returns the grid of the processes that `launch.join` connected. Every process calls it."""
        if processes(parallel) == 1:
            return cls.single(device)
        assert distributed.is_initialized(), "launch.join comes first"
        sizes = tuple(getattr(parallel, setting) for setting in AXES.values())
        device = torch.device(device)
        return cls(device, init_device_mesh(device.type, sizes, mesh_dim_names=tuple(AXES)))

    def size(self, axis: str) -> int:
        """Returns how many ranks an axis has."""
        return 1 if self.mesh is None else self.mesh.size(list(AXES).index(axis))

    def rank(self, axis: str) -> int:
        """Returns this process's rank along an axis."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def world_size(self) -> int:
        """The number of all processes."""
        return 1 if self.mesh is None else self.mesh.size()

    def group(self, axis: str) -> distributed.ProcessGroup | None:
        """Returns the processes that differ from this one along `axis` alone; None: it has size 1."""
        if self.mesh is None or self.size(axis) == 1:
            return None
        return self.mesh.get_group(axis)

    def submesh(self, *axes: str) -> DeviceMesh:
        """Returns the mesh of these axes, through this process."""
        assert self.mesh is not None, "one process has no mesh"
        return self.mesh[axes]

    @property
    def data_rank(self) -> int:
        """Which share of a step's rows this process reads."""
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def data_ranks(self) -> int:
        """How many shares a step's rows are divided into."""
        return math.prod(self.size(axis) for axis in DATA)

    @property
    def gradient_ranks(self) -> int:
        """How many ranks average their gradients."""
        return math.prod(self.size(axis) for axis in GRADIENT)

    @property
    def row_multiple(self) -> int:
        """Streams' lengths are multiples of this: tp and cp hold equal shards of a row's tokens."""
        return self.size("tp") * self.size("cp")

    @property
    def global_rank(self) -> int:
        """This process's rank among all."""
        return 0 if self.mesh is None else distributed.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.global_rank == 0

    @property
    def is_first_of_stage(self) -> bool:
        """Whether no process of a lower rank has the same part of the pipeline."""
        return not any(self.rank(axis) for axis in AXES if axis != "pp")

    def sum(self, values: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
        """Sums `values` in place over the ranks along `axes`, and returns them."""
        for axis in axes:
            if group := self.group(axis):
                distributed.all_reduce(values, group=group)
        return values

    def share(self, value: Any, group: distributed.ProcessGroup | None = None) -> Any:
        """Returns the main process's `value` (anything that pickles) on every process. group: one of
        all processes, in place of the default one."""
        if self.mesh is None:
            return value
        held = [value]
        distributed.broadcast_object_list(held, src=0, group=group)
        return held[0]

    def gather(self, value: Any, group: distributed.ProcessGroup | None = None) -> list[Any]:
        """Returns every process's `value`, on every process; otherwise as `share`."""
        if self.mesh is None:
            return [value]
        held = [None] * self.world_size
        distributed.all_gather_object(held, value, group=group)
        return held

    @property
    def host_group(self) -> distributed.ProcessGroup | None:
        """`launch.host_group` of these processes: for what may make them wait long (files)."""
        return None if self.mesh is None else launch.host_group()

    @contextmanager
    def on_main(self) -> Iterator[bool]:
        """Yields whether this is the main process. All wait for each other's blocks; where some raised an error,
        they raise it, and the others that of the first."""
        error = None
        try:
            yield self.is_main
        except Exception as raised:
            error = raised
        errors = self.gather(_plain(error), self.host_group)
        if error := error or next(filter(None, errors), None):
            raise error

    def barrier(self) -> None:
        """Waits for every process."""
        if self.mesh is not None:
            distributed.barrier()


def _plain(error: Exception | None) -> Exception | None:
    """What other processes are told of an error: it has to come through pickling whole."""
    if error is None or isinstance(error, OSError | ValueError):
        return error
    return RuntimeError(f"{type(error).__name__} of another process: {error}")


ALONE = Grid.single("cpu")  # one process, for what asks no grid for its device
