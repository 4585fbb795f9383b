"""A call in a process of its own: what hangs is ended, and what takes memory takes none of ours."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MEMORY = 4 << 30  # bytes of addresses that a call may take beside those that are taken


@dataclass(frozen=True)
class Outcome:
    """code: negative where a signal ended the call. error: what it wrote to stderr. seconds: of
    processor time, with that of the processes that it waited for."""

    code: int
    error: str
    seconds: float


def isolated(call: Callable[[], int], folder: Path, bound: int, patience: float) -> Outcome:
    """What `call` gives in `folder`, in a fork of this process. bound: seconds of processor time,
    and patience: seconds by the clock, after which it is ended."""
    with tempfile.TemporaryFile() as error:
        deadline = time.monotonic() + patience
        child = os.fork()
        if not child:
            _run(call, folder, error.fileno(), bound)
        code, seconds = _wait(child, deadline)
        error.seek(0)
        return Outcome(code, error.read().decode(errors="replace"), seconds)


def _run(call: Callable[[], int], folder: Path, error: int, bound: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream, to in ((0, nothing), (1, nothing), (2, error)):
            os.dup2(to, stream)
        sys.stdout = open(1, "w", closefd=False, errors="surrogateescape")  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        os.chdir(folder)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (bound, bound))
        code = call()
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code or 0)


def _wait(child: int, deadline: float) -> tuple[int, float]:
    found = 0
    while not found:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if not found and time.monotonic() > deadline:
            _end(child)
            found, status, usage = os.wait4(child, 0)
        time.sleep(0 if found else 0.005)
    _end(child)  # what it has left behind
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _end(child: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
