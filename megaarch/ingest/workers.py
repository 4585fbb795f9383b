"""Who makes shards: this process, others of this machine, or those that mpiexec or srun started."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any

from megaarch.distributed import launch
from megaarch.errors import UserError

MOST_WORKERS = 1024  # as data.workers


@contextmanager
def workers(count: int) -> Iterator[tuple[bool, Executor | None]]:
    """Yields (whether this process leads, the executor of the others or None to work alone).

    count: processes on this machine. Started by mpiexec or srun, rank 0 leads and the others work,
    whatever their machine; they leave the block when the work is done.
    UserError where processes were started that cannot work together, or one of this machine's dies.
    SIGTERM to the process that leads them is a KeyboardInterrupt; they end with it, however it ends.
    """
    if not 1 <= count <= MOST_WORKERS:
        raise UserError(f"--workers must be from 1 to {MOST_WORKERS}, not {count}")
    starter, place = launch.find()
    if place.world_size > 1:
        if count > 1:
            raise UserError(
                f"--workers is for one process, and {starter} started {place.world_size}: leave "
                "it out, each of them works"
            )
        with _world(starter, place.world_size) as executor:
            yield executor is not None, executor
    elif count == 1:
        yield True, None
    else:
        # forked, a worker could inherit a lock that a thread of this process holds
        executor = ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=_end_with_leader
        )
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with executor:
                try:
                    yield True, executor
                except KeyboardInterrupt:
                    for worker in active_children():  # the executor would wait for its shard
                        worker.terminate()
                    raise
        except BrokenExecutor:
            raise UserError(
                "a worker was killed (out of memory?): run the same command again, with fewer "
                "workers, and it continues"
            ) from None
        finally:
            signal.signal(signal.SIGTERM, before)


def _end_with_leader() -> None:
    """Ends this worker as soon as the process that started it is gone."""
    leader = parent_process()
    assert leader is not None

    def watch() -> None:
        leader.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _world(starter: str, size: int) -> Any:
    """Returns mpi4py's executor over all ranks."""
    if starter == "torchrun":
        raise UserError("torchrun starts processes for training: use mpiexec or srun here")
    world = launch.mpi_world(
        starter,
        size,
        missing=f"{starter} started {size} processes, which need mpi4py to work together: "
        "pip install 'megaarch[mpi]'",
        instead="under srun try --mpi=pmix",
    )
    from mpi4py.futures import MPICommExecutor

    return MPICommExecutor(world, root=0)
