"""The `megaarch` command: each of its commands is a file of this folder, with `add` and `run`."""

import argparse
from functools import partial
from typing import Any

from megaarch import __version__
from megaarch.cli import (
    compare,
    describe,
    dry_run,
    evaluate,
    fit,
    generate,
    lm_eval,
    plan,
    plan_inference,
    probe,
    report,
    status,
    submit,
    train,
)
from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser

EPILOG = """\
examples:
  megaarch compare configs/demo.yaml                 eight architectures, equal compute, one report
  megaarch compare configs/demo.yaml --data my.jsonl --set study.budgets=[1e13]
  megaarch train configs/tiny.yaml --set model.preset=t5 training.steps=50
  megaarch generate runs/demo/gpt --prompt "def main"
  megaarch describe configs/studies/wang2022.yaml --json
  megaarch report runs/demo --text
  megaarch fit --points points.csv --leave-out 5
  megaarch probe position runs/demo/gpt
  megaarch plan configs/studies/scale.yaml --gpus 1024 --gpu h100
  megaarch plan-inference configs/studies/scale.yaml --gpu h100 --batch 8
"""

COMMANDS = {
    "train": train,
    "compare": compare,
    "evaluate": evaluate,
    "generate": generate,
    "lm-eval": lm_eval,
    "report": report,
    "fit": fit,
    "probe": probe,
    "describe": describe,
    "plan": plan,
    "plan-inference": plan_inference,
    "dry-run": dry_run,
    "submit": submit,
    "status": status,
}  # in the order of the help


def parser() -> argparse.ArgumentParser:
    """All commands, with the help that a newcomer reads."""
    top = Parser(
        prog="megaarch",
        description="Pretrain every transformer architecture with one stack, and compare them at "
        "equal compute.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"megaarch {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, more: str = "", **how: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=f"{summary}. {more}", **how)

    for name, module in COMMANDS.items():
        module.add(partial(command, name))
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2 for a user's mistake, told in one sentence."""
    options = parser().parse_args(arguments)
    module = COMMANDS[options.command]
    continues = module is train or (module is compare and compare.trains(options))
    return run_command("megaarch", lambda: module.run(options), options.debug, continues)
