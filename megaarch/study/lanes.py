"""Running cells and trials: one after another, or several at a time in processes of their own.

A cell that starts from another waits for it. Small models on a CPU gain from lanes: two processes
of one thread each do more than one process of two threads. A lane's threads are its share of the
machine's, however many jobs are left to run.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megaarch.config.schema import Data, Evaluation, Study
from megaarch.distributed import launch
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.ingest.prepare import Prepared, kind_of, prepare
from megaarch.ingest.split import Exclusion
from megaarch.study import cell as cells
from megaarch.study import lock
from megaarch.study.display import Board, Line, Show
from megaarch.study.grid import GridCell
from megaarch.study.items import Item, split
from megaarch.training.faults import out_of_memory
from megaarch.training.trainer import device_of

_queue = None  # of a lane's process: leads to the board


@dataclass(frozen=True)
class Job:
    """A cell to run, or, with `rate`, a trial of a learning rate on it."""

    name: str
    cell: GridCell
    study: Study
    base: Data  # of the study
    rate: float | None = None


def _prepared(data: Data, size: int) -> Prepared:
    return _read_once(data.model_dump_json(), size)


@lru_cache(maxsize=4)
def _read_once(data: str, size: int) -> Prepared:
    return prepare(Data.model_validate_json(data), size)


def held_out(base: Data, size: int, evaluation: Evaluation) -> dict[str, list[Item]]:
    """The items that score every cell of a study: cut from the study's own text."""
    prepared = _prepared(base, size)
    return split(prepared.heldout, prepared.tokenizer, evaluation)


def text_of(cell: GridCell, base: Data) -> Prepared:
    """What a cell trains on: the study's text, or data of its own under the study's tokenizer and
    without what the study holds out."""
    size, own = cell.settings.model.vocabulary_size, cell.settings.data
    # the objective does not touch the text, unless its records are both text and pairs
    chosen = {name: getattr(own, name) for name in ("source", "kind", "text_field", "held_out")}
    alike = "supervised" not in {own.objective, base.objective} or own.objective == base.objective
    if all(getattr(base, name) == value for name, value in chosen.items()) and (
        alike or kind_of(own) == kind_of(base)
    ):
        return _prepared(base, size)
    if not alike:
        chosen["objective"] = own.objective
    return _own(base.model_copy(update=chosen).model_dump_json(), base.model_dump_json(), size)


@lru_cache(maxsize=4)
def _own(own: str, base: str, size: int) -> Prepared:
    shared = _read_once(base, size)
    data = Data.model_validate_json(own)
    data = data.model_copy(update={"tokenizer": str(shared.tokenizer.path)})
    return prepare(data, size, exclude=Exclusion.of(shared.heldout, shared.heldout_pairs))


def perform(
    job: Job,
    show: Show,
    grid: Grid | None = None,
    heartbeat: Heartbeat | None = None,
    beside: int = 1,
) -> dict[str, Any] | None:
    """Run one job; returns a cell's record or a trial.

    grid: the processes of its layout, which all call this (task.py); None: this one alone. heartbeat:
    theirs. beside: lanes that run side by side, this one among them.
    """
    cell, evaluation = job.cell, job.study.evaluation
    grid = grid or Grid.single(device_of(cell.settings))
    line = Line(job.name, show)
    line.say("building")
    with ExitStack() as locked:

        def enter() -> Prepared:
            if grid.is_main:
                locked.enter_context(lock.alone(folder_of(job), "cell"))
            return text_of(cell, job.base)

        prepared = launch.first(enter)
        held = held_out(job.base, cell.settings.model.vocabulary_size, evaluation)
        if job.rate is None:
            return cells.run(cell, prepared, held, evaluation, line, grid, heartbeat, beside)
        share = job.study.tune.budget
        return cells.trial(cell, job.rate, share, prepared, held, evaluation, line, grid, heartbeat)


def folder_of(job: Job) -> Path:
    """What no other process may use meanwhile: a cell's folder, or that of all trials at a rate."""
    folder = Path(job.cell.settings.logging.directory)
    return folder if job.rate is None else folder / "tune" / "locks" / f"rate-{job.rate:.3g}"


def _attempt(job: Job, show: Show, threads: int, beside: int) -> dict[str, Any]:
    """`perform` in so many threads, where the cell does not set its own; a model that does not fit
    is a ValueError that names the cell."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return perform(job, show, beside=beside)
    except (RuntimeError, MemoryError) as error:
        if said := out_of_memory(error):
            raise UserError(f"cell {job.name}: {said}") from error
        raise
    finally:
        torch.set_num_threads(before)


def run(jobs: list[Job], lanes: int, board: Board) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job with what it gave, as they end; parents before their children."""
    threads = max(1, torch.get_num_threads() // lanes)
    beside = min(lanes, len(jobs))
    if beside <= 1:
        for job in jobs:
            yield job, _attempt(job, board.show, threads, beside)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    drain = threading.Thread(target=_drain, args=(queue, board), daemon=True)
    drain.start()
    waiting = list(jobs)
    with ProcessPoolExecutor(beside, context, _enter_lane, (queue,)) as pool:
        running = {}
        try:
            while waiting or running:
                held_back = {job.cell.key for job in [*waiting, *running.values()]}
                for job in [job for job in waiting if job.cell.parent not in held_back]:
                    waiting.remove(job)
                    running[pool.submit(_in_lane, job, threads, beside)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        yield job, future.result()
                    except BrokenProcessPool:
                        raise UserError(
                            f"cell {job.name}: a lane's process was killed (out of memory?); lower "
                            "study.lanes and run the same command again"
                        ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            queue.put(None)
            drain.join(timeout=5)


def _enter_lane(queue) -> None:
    global _queue
    _queue = queue
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A lane whose study was killed saves its run and ends; it must not train on unseen."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(1)


def _in_lane(job: Job, threads: int, beside: int) -> dict[str, Any]:
    return _attempt(job, lambda *message: _queue.put(message), threads, beside)


def _drain(queue, board: Board) -> None:
    while (message := queue.get()) is not None:
        board.show(*message)
