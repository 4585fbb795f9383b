"""A benchmark in a process of its own: what crashes, hangs or loses the GPU costs its own figures.

A benchmark is a generator of events (record.py). When its process is lost, what it had begun last is
reported as wrong, and a new process goes on without that.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext

import torch

from megaarch.errors import UserError
from tools.throughput.record import Event

START = 120.0  # seconds in which a process must have begun with something
GRACE = 20.0  # seconds past the deadline, in which a benchmark ends by itself
OUT_OF_TIME = "out of time"


class DeviceLost(RuntimeError):
    """A GPU takes no more work from this process."""


class Lost(Exception):
    """A benchmark's process ended before its work; says how."""


def expired(deadline: float | None) -> bool:
    """Whether `time.time()` has passed the deadline. None: never."""
    return deadline is not None and time.time() > deadline


def explain(error: BaseException) -> str:
    """An error as one line. DeviceLost where it took the GPU with it."""
    first = str(error).strip().partition("\n")[0][:300]
    reason = f"{type(error).__name__}: {first}"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise DeviceLost(reason) from error
    return reason


def processes(*modules: str) -> ForkServerContext | SpawnContext:
    """Returns what starts processes. Without a GPU they are forks of one server that has imported
    `modules`, which costs a fraction of an import; with one, new processes, for CUDA forbids forks."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def isolated(
    benchmark: Callable[..., Iterator[Event]],
    arguments: tuple,
    deadline: float | None,
    patience: float = 300.0,
) -> Iterator[Event]:
    """The events of `benchmark(*arguments, lost, deadline)`, which runs in a process of its own.

    lost: reasons by event key; what it holds must not run again. deadline: seconds as of `time.time()`.
    patience: the longest that one event may take, in seconds. ValueError where the process ends
    before it has begun with anything.
    """
    lost: dict[tuple, str] = {}
    while True:
        at = None
        try:
            for event in _stream(benchmark, (*arguments, lost, deadline), deadline, patience):
                at = event if event.result is None else at
                yield event
            return
        except Lost as error:
            if at is None or at.key in lost:
                raise UserError(f"the benchmark's process {error}") from None
            if expired(deadline):
                yield Event(at.head, {"unfinished": OUT_OF_TIME})
                return
            lost[at.key] = f"its process {error}"
            yield Event(at.head, {"wrong": lost[at.key]})


def _stream(
    benchmark: Callable[..., Iterator[Event]],
    arguments: tuple,
    deadline: float | None,
    patience: float,
) -> Iterator[Event]:
    context = processes(benchmark.__module__)
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    process = context.Process(target=_serve, args=(sender, threads, benchmark, arguments))
    process.start()
    sender.close()
    begun = False
    try:
        while True:
            limit = patience if begun else max(patience, START)
            if deadline is not None:
                limit = max(0.0, min(limit, deadline + GRACE - time.time()))
            if not wait([receiver], limit):
                raise Lost(f"gave no sign of life for {limit:.0f} s")
            try:
                event, error = receiver.recv()
            except (EOFError, OSError):
                process.join()
                raise Lost(_ending(process.exitcode)) from None
            if isinstance(error, DeviceLost):
                raise Lost(f"lost the GPU: {error}")
            if error is not None:
                raise error
            if event is None:
                process.join(GRACE)
                return
            begun = True
            yield event
    finally:
        process.kill()
        process.join()


def _serve(
    sender: Connection, threads: int, benchmark: Callable[..., Iterator[Event]], arguments: tuple
) -> None:
    """Sends (event, None) for each, then (None, None), or (None, error): a user's or the GPU's.
    Any other error is a bug: its traceback is printed and the process ends."""
    torch.set_num_threads(threads)
    try:
        for event in benchmark(*arguments):
            sender.send((event, None))
        sender.send((None, None))
    except DeviceLost as error:
        sender.send((None, error))
    except (UserError, OSError) as error:
        sender.send((None, UserError(str(error))))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
