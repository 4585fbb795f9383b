"""The `megaarch` command: of `python -m megaarch` and of the console script."""

import os
import signal
import sys
from types import FrameType

ENTRY = ("megaarch", "megaarch.cli")  # packages whose imports come before any work


def main() -> int:
    """Runs a command; returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from megaarch.cli import main

    return main()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the process where a command imports what it needs: modules of torch and numpy turn a
    KeyboardInterrupt into another error, or swallow it. Elsewhere raises it."""
    while frame is not None:
        loads = frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
        if loads and frame is not None and frame.f_globals.get("__package__") in ENTRY:
            os.write(sys.stderr.fileno(), b"megaarch: interrupted\n")
            os._exit(130)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
