"""A folder serves one process at a time: an advisory lock on the file `lock` in it."""

import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from megaarch.distributed.mesh import ALONE, Grid
from megaarch.errors import UserError
from megaarch.files import check_regular, open_regular, take_lock

log = logging.getLogger(__name__)
PATIENCE = 1.0  # seconds; a look at a lock (`is_held`) takes it for a moment
# seconds that a holder may outlive its process: file servers keep the locks of a node that was lost
# for a lease, and a loader's workers those of a process that was killed
LEASE = 150.0
NAMES = 1 << 10  # bytes of a host's name and a process's number
PID = re.compile(r"[0-9]{1,9}")


@contextmanager
def alone(folder: Path, what: str, grid: Grid = ALONE) -> Iterator[None]:
    """Holds the folder's lock. UserError where another process is running `what` there.

    grid: all its processes call this; the main one holds the lock, and its error is everyone's.
    Some network file systems keep no locks; there it warns and holds nothing.
    """
    with ExitStack() as held:
        with grid.on_main() as main:
            if main:
                held.enter_context(_locked(folder, what))
        yield


@contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    new = not path.exists()
    if not new:
        check_regular(path)
    with path.open("a+") as file:
        _wait(file, folder, what)
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        try:
            yield
        except BaseException:
            if new and all(entry == path for entry in folder.iterdir()):  # nothing came of it
                path.unlink()
                with suppress(OSError):
                    for empty in made:
                        empty.rmdir()
            raise


def _wait(file: IO[str], folder: Path, what: str) -> None:
    """Until the lock is ours. Waits longer where its holder is elsewhere, or is no more."""
    began, waits = time.monotonic(), False
    while not take_lock(file):
        waited = time.monotonic() - began
        if waited > (PATIENCE if _lives(file) else LEASE):
            raise UserError(
                f"{folder}: another process is running this {what}; wait for it, or give "
                "another directory"
            )
        if waited > PATIENCE and not waits:
            waits = True
            log.warning(
                "%s is locked by a process of another node, or of a run that was killed; waiting "
                "up to %.0f s for it",
                folder,
                LEASE,
            )
        time.sleep(PATIENCE / 20)


def _lives(file: IO[str]) -> bool:
    """Whether the process that wrote its name into the lock is one of this node, and runs."""
    file.seek(0)
    host, _, pid = file.read(NAMES).strip().partition(" ")
    if not PID.fullmatch(pid):
        return True  # one that has just taken it, or of an earlier version
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        with open_regular(folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
