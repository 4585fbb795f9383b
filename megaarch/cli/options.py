"""Arguments that several commands share, and the configuration that they give."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaarch import config
from megaarch.errors import UserError

RUN_HELP = "a run's folder, with checkpoints in it, one of these, or STUDY/CELL for a study's cell"
SET_HELP = (
    "settings that replace those of the file, e.g. --set model.layers=4 training.seed=1; the value "
    "is read as YAML, and the flag can be given more than once"
)


class Parser(argparse.ArgumentParser):
    """argparse's, but an option's empty value is a mistake, for it would mean the default or the current
    folder; of an empty prompt the command says more. So is `--name=--`, an empty list in Python 3.11."""

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        before = ""
        for given in sys.argv[1:] if args is None else args:
            name, equals, value = given.partition("=") if given else (before, "=", "")
            missing = value == "--" or (not value and name != "--prompt")
            if name.startswith("-") and equals and missing:
                self.error(f"argument {name}: expected a value, not {value!r}")
            before = given
        return super().parse_known_args(args, namespace)


Adder = Callable[..., argparse.ArgumentParser]  # of a command: summary, more


def study_arguments(command: argparse.ArgumentParser) -> None:
    config_arguments(command)
    command.add_argument(
        "--data",
        metavar="PATH",
        help="your own text: .jsonl, .parquet or .txt (.gz, .bz2, .xz, .zst too), or a folder of these",
    )
    command.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a SentencePiece .model or Hugging "
        "Face tokenizer.json; without it one is trained on the text",
    )
    command.add_argument("--output", metavar="DIR", help="the study's folder (default: runs/NAME)")


def config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/tiny.yaml")
    set_argument(command)


def set_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", metavar="A.B=C", nargs="+", action="extend", default=[], help=SET_HELP
    )


def check_ranges(options: argparse.Namespace, **ranges: tuple[int, int]) -> None:
    """UserError for a number that is given and is not from the least to the most of its range."""
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} to {most:,}")


def print_result(options: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    """Prints what a command has found: as JSON with --json, else for a terminal."""
    print(json.dumps(record, indent=1) if options.json else text)


def read(options: argparse.Namespace) -> config.Raw:
    """The raw configuration of a command: file, then --data and --tokenizer, then --set."""
    raw = config.read_yaml(options.config)
    for flag, path in (("data", "data.source"), ("tokenizer", "data.tokenizer")):
        if value := getattr(options, flag, None):
            config.set_path(raw, path, value)
    for text in options.set:
        config.set_path(raw, *config.parse_override(text))
    return raw


def read_study(options: argparse.Namespace) -> tuple[config.Raw, Path]:
    """The raw configuration of a study, and its folder."""
    from megaarch.study.cells import study_of

    raw = read(options)
    name = study_of(raw, options.config).name
    return raw, Path(options.output or Path("runs") / name)
