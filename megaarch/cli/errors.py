"""How a command ends: its exit code, and what ended it early in one sentence."""

import logging
import os
import signal
import sys
from collections.abc import Callable

from megaarch.training.faults import REQUEUE, Stopped, out_of_memory


def told(program: str, command: Callable[[], int], debug: bool = False) -> int:
    """The exit code of a command; what ends it early is told in one sentence.

    program: its name ahead of the sentence. debug: let the error through, with its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megaarch").setLevel(logging.INFO)
    try:
        return command()
    except BrokenPipeError:  # whoever read has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        if speaks() or isinstance(error, OSError):
            print(f"{program}: {_sentence(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        said = out_of_memory(error)
        if debug or said is None:
            raise
        print(f"{program}: {said}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if speaks():
            print(f"{program}: {stop}", file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else REQUEUE
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def speaks() -> bool:
    """Whether this process prints: of a job's processes, the first. A user's mistake is the same
    on all of them."""
    from megaarch.distributed import launch

    try:
        return launch.find()[1].rank == 0
    except ValueError:  # the mistake itself
        return True


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if str(error) == "embedded null byte":
        return "a path has a NUL character, which no file's name has: give another"
    return str(error)
