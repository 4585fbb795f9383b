"""Running cells and trials: one after another, or several at a time in processes of their own.

A cell that starts from another waits for it. Small models on a CPU gain from lanes: two processes
of one thread each do more than one process of two threads.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from megaarch.data.prepare import Prepared, prepare
from megaarch.settings import Data, Evaluation, Study
from megaarch.study import cell as cells
from megaarch.study.display import Board, Line, Show
from megaarch.study.grid import GridCell
from megaarch.study.items import Item, split

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
    """What a cell trains on: the study's text, or data of its own under the study's tokenizer."""
    size, own = cell.settings.model.vocabulary_size, cell.settings.data
    shared = _prepared(base, size)
    same = own.source == base.source and own.kind == base.kind and own.held_out == base.held_out
    if same and own.tokenizer == base.tokenizer:
        return shared
    tokenizer = own.tokenizer or str(shared.tokenizer.path)
    # the objective and its settings do not touch the text
    plain = base.model_copy(
        update={
            "source": own.source,
            "kind": own.kind,
            "text_field": own.text_field,
            "held_out": own.held_out,
            "tokenizer": tokenizer,
        }
    )
    return _prepared(plain, size)


def perform(job: Job, show: Show) -> dict[str, Any]:
    """Run one job; returns a cell's record or a trial."""
    evaluation = job.study.evaluation
    prepared = text_of(job.cell, job.base)
    held = held_out(job.base, job.cell.settings.model.vocabulary_size, evaluation)
    line = Line(job.name, show)
    line.say("building")
    if job.rate is None:
        return cells.run(job.cell, prepared, held, evaluation, line)
    share = job.study.tune.budget
    return cells.trial(job.cell, job.rate, share, prepared, held, evaluation, line)


def run(jobs: list[Job], lanes: int, board: Board) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job with what it gave, as they end; parents before their children."""
    if lanes == 1 or len(jobs) == 1:
        for job in jobs:
            yield job, perform(job, board.show)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    drain = threading.Thread(target=_drain, args=(queue, board), daemon=True)
    drain.start()
    threads = max(1, torch.get_num_threads() // lanes)
    waiting = list(jobs)
    with ProcessPoolExecutor(lanes, context, _enter_lane, (queue, threads)) as pool:
        running = {}
        try:
            while waiting or running:
                held_back = {job.cell.key for job in [*waiting, *running.values()]}
                for job in [job for job in waiting if job.cell.parent not in held_back]:
                    waiting.remove(job)
                    running[pool.submit(_in_lane, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        yield job, future.result()
                    except BrokenProcessPool:
                        raise ValueError(
                            f"cell {job.name}: a lane's process was killed (out of memory?); lower "
                            "study.lanes and run the same command again"
                        ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            queue.put(None)
            drain.join(timeout=5)


def _enter_lane(queue, threads: int) -> None:
    global _queue
    _queue = queue
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A lane whose study was killed saves its run and ends; it must not train on unseen."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(1)


def _in_lane(job: Job) -> dict[str, Any]:
    return perform(job, lambda *message: _queue.put(message))


def _drain(queue, board: Board) -> None:
    while (message := queue.get()) is not None:
        board.show(*message)
