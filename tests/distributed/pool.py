"""Worker processes for distributed tests: `world_size` ranks joined by gloo on this machine.

    def losses(preset, layout):            # at the top level of a test module
        ...                                # torch.distributed is ready here
        return [1.0, 2.0]                  # anything that pickles; tensors come back whole

    def test_it(pool):                     # the fixture of tests/distributed/conftest.py
        first, second = pool.run(2, losses, "gpt", {"tensor_parallel": 2})

Each run has processes and process groups of its own, forked from one server that has imported
torch, so a run costs a fraction of an import. Workers are not used again: torch compares device
meshes without their process groups, so a cache of an earlier run would answer with dead groups.
A run does several presets in one go where that saves time.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LARGEST = 8
GRACE = 3.0  # seconds that the other ranks have to answer once one has failed
PRELOAD = [
    "pytest",
    "torch",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.experimental",
    "torch.distributed.tensor.parallel",
    "torchao.float8",
    "megaarch.ingest.prepare",
    "megaarch.study.run_study",
    "megaarch.study.evaluate_run",
    "megaarch.training.trainer",
]


class RankError(AssertionError):
    """A rank raised, died or did not answer; the message has its traceback."""


class SegmentationError(RankError):
    """A rank died of SIGSEGV, or of SIGABRT where malloc saw it first; the message says where its Python
    threads were."""


@contextmanager
def _kept(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Gives what makes a folder's content what it is now: a run that died may have left checkpoints, from which
    the next one would go on."""
    if folder is None:
        yield lambda: None
        return
    with tempfile.TemporaryDirectory() as aside:
        copy = Path(aside) / "copy"
        shutil.copytree(folder, copy, symlinks=True)

        def put_back() -> None:
            shutil.rmtree(folder)
            shutil.copytree(copy, folder, symlinks=True)

        yield put_back


class Pool:
    """See the module's docstring. folder: the test's own, which is put back before a run is made again."""

    folder: Path | None = None

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 400.0,
        environment: dict[str, str] | None = None,
    ) -> list[Any]:
        """`function(*args)` on each of `world_size` ranks; returns their results in rank order.

        function: importable by name. timeout: seconds, after which every rank is killed.
        environment: variables set in every rank.
        Raises RankError with the traceback of the first rank that failed.

        A rank that dies of a fault is run once more, with all others, and a warning says where it died: while
        gloo's groups had two threads, one of about a thousand runs did (docs/log.md).
        """
        with _kept(self.folder) as put_back:
            try:
                return self._run(world_size, function, args, timeout, environment)
            except SegmentationError as error:
                warnings.warn(f"ran again: {error}", stacklevel=2)
                put_back()
                return self._run(world_size, function, args, timeout, environment)

    def _run(
        self,
        world_size: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float,
        environment: dict[str, str] | None,
    ) -> list[Any]:
        assert 1 <= world_size <= LARGEST, world_size
        payload = pickle.dumps((function, args))
        variables = {"OMP_NUM_THREADS": "1", **(environment or {})}
        with tempfile.TemporaryDirectory() as folder, _environment(variables):
            workers, pipes = [], []
            for rank in range(world_size):
                ours, theirs = self.context.Pipe()
                worker = self.context.Process(
                    target=_work,
                    args=(theirs, payload, rank, world_size, Path(folder), timeout, variables),
                    daemon=True,
                )
                worker.start()
                theirs.close()
                workers.append(worker)
                pipes.append(ours)
            try:
                return _gather(workers, pipes, timeout, Path(folder))
            finally:
                for worker in workers:
                    worker.kill()
                    worker.join()


def _gather(workers: list, pipes: list[Connection], timeout: float, folder: Path) -> list[Any]:
    waiting, results, failed, kind = dict(enumerate(pipes)), {}, "", RankError
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(waiting.values(), left):
            rank = pipes.index(pipe)
            del waiting[rank]
            try:
                fine, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                workers[rank].join(GRACE)
                code = workers[rank].exitcode
                fine, result = False, f"died with exit code {code}\n{_threads(folder, rank)}"
                if code in (-signal.SIGSEGV, -signal.SIGABRT) and not failed:
                    kind = SegmentationError
            if fine:
                results[rank] = result
            elif not failed:
                failed = f"rank {rank} of {len(pipes)}: {result}"
                deadline = min(deadline, time.monotonic() + GRACE)
    if failed:
        raise kind(failed)
    if waiting:
        raise RankError(f"no answer within {timeout:g} s from ranks {sorted(waiting)}; killed all")
    return [results[rank] for rank in range(len(pipes))]


def _threads(folder: Path, rank: int) -> str:
    """What a rank that died of a fault wrote of its Python threads."""
    path = folder / f"fault{rank}"
    return path.read_text() if path.exists() else ""


def _work(
    pipe: Connection,
    payload: bytes,
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    variables: dict[str, str],
) -> None:
    gc.freeze()  # a collection looks at no module of the server's: it would copy each of their pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable((folder / f"fault{rank}").open("w"))
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}  # as torchrun says it
    os.environ |= variables | {name: str(number) for name, number in place.items()}
    try:
        import torch
        from torch import distributed

        from megaarch.distributed.gloo import use_one_thread

        torch.set_num_threads(1)
        use_one_thread()
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        function, args = pickle.loads(payload)
        answer = pickle.dumps((True, function(*args)))
        distributed.barrier()  # no rank closes its sockets while another still reads
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _environment:
    """Variables set for a while: the fork server takes those of the moment it starts."""

    def __init__(self, variables: dict[str, str]):
        self.variables = variables

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ |= self.variables

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
