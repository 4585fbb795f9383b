"""Runs cells and trials: one after another, or several at a time in processes of their own
(`study.lanes`).

A cell that starts from another waits for it. Small models on a CPU gain from it: two processes of
one thread each do more than one process of two threads. A process has its share of the machine's
threads, however many jobs are left to run. Where the study is told to stop, or dies, every run of its
lanes is saved and no other begins.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch

from megaarch.distributed import launch
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.evaluation.items import Item
from megaarch.evaluation.scorer import Room
from megaarch.ingest.prepared_data import Prepared
from megaarch.study import lock, run_cell
from megaarch.study.cells import StudyCell, title
from megaarch.study.folder import StudyFolder
from megaarch.study.progress_bar import ProgressBar, ProgressDisplay, Show
from megaarch.study.results import CellRecord
from megaarch.training.memory_check import out_of_memory
from megaarch.training.preemption import Stopped, Watch
from megaarch.training.trainer import device_of

LISTEN = 1.0  # seconds until a signal to the study is noticed
PATIENCE = 10  # seconds that a lane without a job gives its study to end it


def kept(folder: StudyFolder, cell: StudyCell, show: Show) -> CellRecord | None:
    """The record of a cell that is finished, and says so; None of one that is not, and of a trial."""
    record = folder.finished(cell) if cell.choice is None else None
    if record:
        show(title(cell, folder.study), 1.0, f"done before  {run_cell.summary(record)}")
    return record


def perform(
    folder: StudyFolder,
    cell: StudyCell,
    show: Show,
    grid: Grid | None = None,
    heartbeat: Heartbeat | None = None,
    lanes: int = 1,
) -> CellRecord | None:
    """Runs one cell or trial of a study and returns its record.

    grid: the processes of its layout, which all call this (distributed_cell.py); None: this one alone.
    heartbeat: theirs. lanes: how many cells run side by side, this one among them.
    """
    grid = grid or Grid.single(device_of(cell.settings))
    bar = ProgressBar(title(cell, folder.study), show)
    bar.set_text("building")
    setup = run_cell.Setup(folder, cell, bar, grid, heartbeat, lanes)
    with ExitStack() as locked:

        def enter() -> tuple[Prepared, dict[str, list[Item]], Room]:
            if grid.is_main:
                locked.enter_context(lock.alone(cell.locked, "cell"))
            return setup.prepared, setup.held, folder.room

        launch.first(enter)
        return run_cell.run(setup) if cell.choice is None else run_cell.trial(setup)


def _attempt(
    folder: StudyFolder, cell: StudyCell, show: Show, threads: int, lanes: int
) -> CellRecord:
    """`perform` in so many threads, where the cell does not set its own; a model that does not fit
    is a UserError that names the cell."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        record = perform(folder, cell, show, lanes=lanes)
        assert record is not None, "one process alone is the main one"
        return record
    except (RuntimeError, MemoryError) as error:
        if said := out_of_memory(error):
            raise UserError(f"cell {title(cell, folder.study)}: {said}") from error
        raise
    finally:
        torch.set_num_threads(before)


def run(
    folder: StudyFolder, cells: list[StudyCell], display: ProgressDisplay
) -> Iterator[tuple[StudyCell, CellRecord]]:
    """Yields each of these cells or trials with its record, those that are finished first and the others as they end;
    parents before their children."""
    waiting = []
    for cell in cells:
        if record := kept(folder, cell, display.show):
            yield cell, record
        else:
            waiting.append(cell)
    threads = max(1, torch.get_num_threads() // folder.study.lanes)
    lanes = min(folder.study.lanes, len(waiting))
    if lanes <= 1:
        for cell in waiting:
            yield cell, _attempt(folder, cell, display.show, threads, lanes)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    stop, lead = context.Pipe(duplex=False)  # `stop` ends when `lead` closes, or this process does
    drain = threading.Thread(target=_drain, args=(queue, display), daemon=True)
    drain.start()
    running: dict[Future[CellRecord], StudyCell] = {}
    with Watch() as signals, ProcessPoolExecutor(lanes, context, _enter, (queue, stop)) as pool:
        try:
            while waiting or running:
                unfinished = {cell.key for cell in [*waiting, *running.values()]}
                for cell in [cell for cell in waiting if cell.parent not in unfinished]:
                    waiting.remove(cell)
                    running[pool.submit(_in_worker, folder, cell, threads, lanes)] = cell
                for future in wait(running, LISTEN, FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    yield cell, _record_of(future, title(cell, folder.study))
                if signals.asked:
                    raise Stopped(signals.asked)
        except BaseException as error:
            lead.close()
            pool.shutdown(wait=False, cancel_futures=True)
            if signals.asked and isinstance(error, Exception):  # what a lane says of it came first
                raise Stopped(signals.asked) from None
            raise
        finally:
            queue.put(None)
            drain.join(timeout=5)


def _record_of(future: "Future[CellRecord]", name: str) -> CellRecord:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            f"cell {name}: a lane's process was killed (out of memory?); lower "
            "study.lanes and run the same command again"
        ) from None


class _Lane:
    """What a worker process keeps. queue: leads to the display. stop: ends when the study does. stopped:
    set once a signal ended a job here; the pool hands out the next one, which must not begin. at_work:
    whether it has a job. SIGTERM is ignored between jobs: it would end this process with the lock of the pool's
    queue in its hand, for which the others wait without end."""

    queue: Any
    stop: Connection
    stopped = threading.Event()
    at_work = False


def _enter(queue: Any, stop: Connection) -> None:
    _Lane.queue, _Lane.stop = queue, stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave, daemon=True).start()


def _leave() -> None:
    """Saves this lane's run and ends it, once its study is stopped or killed: it must not train on unseen."""
    _Lane.stop.poll(None)
    os.kill(os.getpid(), signal.SIGTERM)
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive() and _Lane.at_work:
        parent.join(1)
    parent.join(PATIENCE)  # a pool that is whole ends this process by itself
    if _Lane.at_work:
        _Lane.stopped.wait(60)
    os._exit(1)


def _in_worker(folder: StudyFolder, cell: StudyCell, threads: int, lanes: int) -> CellRecord:
    if _Lane.stopped.is_set() or _Lane.stop.poll():
        raise Stopped(signal.SIGTERM)
    _Lane.at_work = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return _attempt(folder, cell, lambda *said: _Lane.queue.put(said), threads, lanes)
    except (Stopped, KeyboardInterrupt):
        _Lane.stopped.set()
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _Lane.at_work = False


def _drain(queue, display: ProgressDisplay) -> None:
    while (message := queue.get()) is not None:
        display.show(*message)
