"""Jobs for tests of faults: `megaarch train` as real processes, started as torchrun does.

    job = Job(settings, tmp_path)          # as many processes as the layout asks for
    job.kill(1, signal.SIGKILL)
    codes = job.wait(30.0)                 # exit codes in rank order, negative for a signal
    job.told                               # what they wrote to stderr

The processes are forked from one server that has imported torch (pool.py says why).
"""

import gc
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml

from megaarch.config.schema import Settings
from megaarch.distributed.mesh import AXES
from tests.distributed.pool import PRELOAD


class Job:
    """One start of a run. before: called with `argument` in every process, before the command."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        before: Callable[[Any], None] | None = None,
        argument: Any = None,
    ):
        self.directory = Path(settings.logging.directory)
        self.world_size = math.prod(getattr(settings.parallel, name) for name in AXES.values())
        self.errors = folder / "stderr"
        self.errors.write_text("")
        config = folder / "run.yaml"
        raw = settings.model_dump(mode="json", exclude_none=True, exclude={"study"})
        config.write_text(yaml.safe_dump(raw))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "megaarch.cli", "megaarch.study.progress_bar"])
        port = free_port()
        self.processes = []
        for rank in range(self.world_size):
            place = {"RANK": rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": rank}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(
                target=_train, args=(place, config, self.errors, before, argument), daemon=True
            )
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def kill(self, rank: int, number: int) -> None:
        """Send a signal to one process."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float, ranks: list[int] | None = None) -> list[int | None]:
        """Exit codes, once all processes (of these ranks) have ended; None for one that has not
        within `seconds`."""
        wanted = [self.processes[rank] for rank in (ranks or range(self.world_size))]
        deadline = time.monotonic() + seconds
        while alive := [p.sentinel for p in wanted if p.is_alive()]:
            if not wait(alive, max(deadline - time.monotonic(), 0)):
                break
        return [p.exitcode for p in wanted]

    @property
    def alive(self) -> bool:
        """Whether any process still runs."""
        return any(p.is_alive() for p in self.processes)

    @property
    def told(self) -> str:
        """What the processes wrote to stderr."""
        return self.errors.read_text()

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def reach(self, step: int, seconds: float = 240.0) -> None:
        """Waits until a step is done."""
        deadline = time.monotonic() + seconds
        while self.step() < step:
            assert self.alive and time.monotonic() < deadline, self.told
            time.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(
    place: dict[str, Any],
    config: Path,
    errors: Path,
    before: Callable[[Any], None] | None,
    argument: Any,
) -> None:
    gc.freeze()  # as in pool.py
    os.environ |= {name: str(value) for name, value in place.items()}
    file = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")

    import torch

    from megaarch.cli import main

    torch.set_num_threads(1)
    if before:
        before(argument)
    sys.exit(main(["train", str(config)]))
