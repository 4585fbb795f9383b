"""When a run's checkpoints are written: at once, or in the background while training goes on.

In the background, the state is copied to host memory, and a thread of each process writes the copy
(torch's state_dict_saver.async_save) and seals what it wrote. Only the manifest and renaming are left, and all
processes come together for that between two steps: a checkpoint is complete or absent, as ever. A thread and not a
process of its own: what is killed takes its writer along, and nothing survives to write into a
folder that the restarted run uses.

The threads have the host group to themselves: between `_begin` and the end of this process's part,
the main thread uses other groups only, so that collectives have one order on all processes.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from megaarch.checkpoint import checkpoint, manifest, storage
from megaarch.checkpoint.manifest import Manifest
from megaarch.checkpoint.record import CheckpointRecord
from megaarch.config.schema import Training
from megaarch.distributed import launch
from megaarch.distributed.mesh import Grid
from megaarch.engine.base import Engine

# names launch/job.sh's list of starts that have lost a rank since a step was saved
LOSSES = "MEGAARCH_LOSSES"
# torch 2.11 closes a stager behind the first state that it has copied
STAGES_ONCE = torch.__version__ < "2.13"


@dataclass(frozen=True)
class _Flight:
    """A checkpoint in the making. sealed: once this process's shards are written, their part of the
    manifest."""

    path: Path
    aside: Path
    record: CheckpointRecord
    sealed: Future[Manifest]


class Saver:
    """Saves a run's checkpoints as `training` says. Every method is called by all processes of
    `grid` together, and raises OSError on all of them where a checkpoint could not be written."""

    def __init__(self, run: Path, training: Training, grid: Grid):
        self.run, self.training, self.grid = run, training, grid
        self._flight: _Flight | None = None
        self._stager = None
        self._thread = ThreadPoolExecutor(1, "seal")  # starts with what it is first given

    def save(self, engine: Engine, optimizer: Optimizer, record: CheckpointRecord) -> None:
        """Write the checkpoint of the record's step aside, seal it and put it in force, or begin to; the one
        before it is finished first."""
        self.finish()
        path = checkpoint.place(self.run, record.progress.step)
        aside = checkpoint.begin(path, self.grid)
        if self.training.async_save:
            sealed = self._begin(path, aside, checkpoint.state_of(engine, optimizer))
            self._flight = _Flight(path, aside, record, sealed)
            return
        with self.grid.on_main():
            with checkpoint.written(path):
                state = checkpoint.state_of(engine, optimizer)
                values = self.grid.is_first_of_stage
                storage.save(state, aside / "state", self.grid.host_group, values)
            sealed = manifest.seal(aside, self.grid)
        self._put(path, aside, sealed, record)

    def _begin(self, path: Path, aside: Path, state: storage.State) -> Future[Manifest]:
        if self._stager is None or STAGES_ONCE:
            cuda = self.grid.device.type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=cuda,
                )
            )
        written = state_dict_saver.async_save(
            state,
            storage_writer=storage.Writer(aside / "state"),
            planner=storage.SavePlanner(self.grid.is_first_of_stage),
            process_group=launch.host_group() if distributed.is_initialized() else None,
            async_stager=self._stager,
        )
        assert isinstance(written, Future), "it is two where the copy is made in the background too"
        return self._thread.submit(_seal, written, path, aside, self.grid)

    @property
    def ready(self) -> int:
        """The step of the checkpoint in the making, once this process's part of it is; else 0."""
        flight = self._flight
        return flight.record.progress.step if flight and flight.sealed.done() else 0

    def finish_if(self, ready: int) -> None:
        """Put the checkpoint in the making in force if it is ready on all processes. ready: the sum
        of what they said."""
        flight = self._flight
        if flight and ready == flight.record.progress.step * self.grid.world_size:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the making, if there is one, and put it in force."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        with self.grid.on_main():
            sealed = flight.sealed.result()
        self._put(flight.path, flight.aside, sealed, flight.record)

    def _put(self, path: Path, aside: Path, sealed: Manifest, record: CheckpointRecord) -> None:
        keep, every = self.training.keep_checkpoints, self.training.keep_every
        checkpoint.put(aside, path, sealed, record, keep, every, self.grid)
        if (losses := os.environ.get(LOSSES)) and self.grid.is_main:
            with suppress(OSError):
                Path(losses).unlink(missing_ok=True)


def _seal(written: Future, path: Path, aside: Path, grid: Grid) -> Manifest:
    with checkpoint.written(path):
        written.result()
    return manifest.seal(aside, grid)
