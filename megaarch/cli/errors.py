"""How a command ends: its exit code, and one sentence or a traceback for what ended it early."""

import errno
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

from megaarch import __version__
from megaarch.errors import UserError
from megaarch.training.preemption import REQUEUE, Stopped

# Faults of the machine that the system reports without the name of a file.
MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}


def run_command(
    program: str, command: Callable[[], int], debug: bool = False, continues: bool = False
) -> int:
    """Runs a command and returns its exit code.

    What a user can mend is one sentence and code 2; what stopped a run, code 130 or REQUEUE; a fault of
    the network or of a GPU has code LOST, as a lost rank has; a bug shows its traceback and has code 1.
    program: the name before the sentence. debug: raise every error. continues: whether the same command
    goes on where it was interrupted; a KeyboardInterrupt with words says them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megaarch").setLevel(logging.INFO)
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # what fails of it is told here; the interpreter would end with code 120
        return code
    except BrokenPipeError:  # the reader has gone, as in `| head`
        _drop_unwritten()
        return 0
    except Stopped as stop:
        if is_first_process():
            print(f"{program}: {stop}", file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else REQUEUE
    except KeyboardInterrupt as stop:
        more = str(stop) or ("run the same command again to continue" if continues else "")
        print("; ".join(filter(None, (f"{program}: interrupted", more))), file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        sentence = user_sentence(error)
        if sentence is None:
            traceback.print_exc()
            if part := _failed_part(error):
                from megaarch.distributed.heartbeat import LOST

                print(
                    f"{program}: {part} failed, seen from {socket.gethostname()}: the same command continues "
                    "from the last checkpoint; where it fails there again, leave that machine out",
                    file=sys.stderr,
                )
                return LOST
            print(
                f"{program}: this is a bug of megaarch {__version__}: report it with the traceback "
                "and the command (CONTRIBUTING.md, Reporting a bug)",
                file=sys.stderr,
            )
            return 1
        _drop_unwritten()
        # the mistake is the same in all processes of a job, but a disk may fail in one
        if is_first_process() or not isinstance(error, (UserError, FloatingPointError)):
            print(f"{program}: {sentence}", file=sys.stderr)
        return 2


def _drop_unwritten() -> None:
    """Drops what stdout does not take (a full disk, a reader who has gone), for the interpreter tries it again as it
    ends."""
    if (stdout := sys.stdout) is None:
        return
    try:
        stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _failed_part(error: Exception) -> str | None:
    """Returns what of the machines has failed, where torch says so: a part of the job is gone, as a rank is."""
    if (torch := sys.modules.get("torch")) is None:
        return None
    if isinstance(error, torch.AcceleratorError):
        return "a GPU"
    return "the network" if isinstance(error, torch.distributed.DistError) else None


def is_first_process() -> bool:
    """Whether this is the process of a job that prints."""
    from megaarch.distributed import launch

    try:
        return launch.find()[1].rank == 0
    except UserError:  # the mistake itself
        return True


def user_sentence(error: Exception) -> str | None:
    """Returns the sentence for an error that a user can mend, None for a bug."""
    if isinstance(error, (UserError, FloatingPointError)):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is not None:
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        return error.strerror if error.errno in MACHINE else None
    if isinstance(error, ValueError) and str(error) == "embedded null byte":
        return "a path has a NUL character, which no file's name has: give another"
    if isinstance(error, (RuntimeError, MemoryError)):
        from megaarch.training.memory_check import out_of_memory

        return out_of_memory(error)
    return None
