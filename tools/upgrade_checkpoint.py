"""Checkpoints of megaarch 0.1 to this version, in place: `python tools/upgrade_checkpoint.py --help`."""

import argparse
import sys
from pathlib import Path

from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="upgrade_checkpoint.py",
        description="Bring checkpoints of megaarch 0.1, whose index is a pickle, to this version, in place. Nothing in "
        "them is executed; weights and the optimizer's state stay as they are, so that a run continues.",
    )
    top.add_argument("source", metavar="SOURCE", type=Path, help="a run's folder, or a checkpoint")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command("upgrade_checkpoint.py", lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> int:
    from megaarch.interchange.upgrade import upgrade

    for path in (found := upgrade(options.source)):
        print(f"{path} is of this version now")
    if not found:
        print(f"{options.source} is of this version already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
