"""The `megaarch` command: train, compare, evaluate, report, describe."""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from megaarch import __version__, config
from megaarch.training.faults import REQUEUE, Stopped

EPILOG = """\
examples:
  megaarch compare configs/demo.yaml                 eight architectures, equal compute, one report
  megaarch compare configs/demo.yaml --data my.jsonl --set study.budgets=[1e13]
  megaarch train configs/tiny.yaml --set model.preset=t5 training.steps=50
  megaarch describe configs/studies/wang2022.yaml --json
  megaarch report runs/demo --text
"""

SET_HELP = (
    "settings that replace those of the file, e.g. --set model.layers=4 training.seed=1; the value "
    "is read as YAML, and the flag can be given more than once"
)


Adder = Callable[..., argparse.ArgumentParser]  # of a command: name, summary, more


def parser() -> argparse.ArgumentParser:
    """All commands, with the help that a newcomer reads."""
    top = argparse.ArgumentParser(
        prog="megaarch",
        description="Pretrain every transformer architecture with one stack, and compare them at "
        "equal compute.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"megaarch {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=f"{summary}. {more}")

    _train_arguments(command)
    _compare_arguments(command)
    _evaluate_arguments(command)
    _report_arguments(command)
    _describe_arguments(command)
    return top


def _train_arguments(command: Adder) -> None:
    train = command(
        "train",
        "Train one model",
        "Writes metrics.jsonl, TensorBoard files and checkpoints to logging.directory; run again, "
        "it continues from the newest checkpoint there.",
    )
    _config_arguments(train)


def _compare_arguments(command: Adder) -> None:
    compare = command(
        "compare",
        "Run a study: every cell at the same budget, then the report",
        "Cells that are finished are kept and an interrupted one continues, so a longer list of "
        "sizes, budgets or seeds runs only what is new. Ends with a table, results.json and "
        "report.html in the study's folder.",
    )
    _config_arguments(compare)
    compare.add_argument(
        "--data",
        metavar="PATH",
        help="your own text: .jsonl, .parquet or .txt (.gz and .zst too), or a folder of these",
    )
    compare.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a SentencePiece .model or Hugging "
        "Face tokenizer.json; without it one is trained on the text",
    )
    compare.add_argument("--output", metavar="DIR", help="the study's folder (default: runs/NAME)")
    compare.add_argument(
        "--dry-run",
        action="store_true",
        help="time a step of each cell and "
        "print steps, tokens, epochs, disk and hours; train nothing",
    )


def _evaluate_arguments(command: Adder) -> None:
    evaluate = command(
        "evaluate",
        "Score a trained run on held-out text",
        "Bits per byte of continuations and middles, and a four-way choice.",
    )
    evaluate.add_argument("run", metavar="RUN", help="a run's folder, with checkpoints in it")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    _set_argument(evaluate)


def _report_arguments(command: Adder) -> None:
    report = command(
        "report",
        "Write a study's report from its results.json",
        "Without an option it writes report.html into the study's folder.",
    )
    report.add_argument("run", metavar="RUN", help="a study's folder, with results.json in it")
    kind = report.add_mutually_exclusive_group()
    kind.add_argument("--text", action="store_true", help="print a table of 80 columns")
    kind.add_argument("--csv", action="store_true", help="print comma-separated values")
    kind.add_argument("--latex", action="store_true", help="print a LaTeX table (booktabs)")
    kind.add_argument("--figures", metavar="DIR", help="write each figure as PDF and SVG")


def _describe_arguments(command: Adder) -> None:
    describe = command(
        "describe",
        "Print what each cell is: parameters, FLOPs and tokens of a row, lengths",
    )
    _config_arguments(describe)
    describe.add_argument("--json", action="store_true", help="print one JSON object")


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/tiny.yaml")
    _set_argument(command)


def _set_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", metavar="A.B=C", nargs="+", action="extend", default=[], help=SET_HELP
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 2 for a user's mistake, told in one sentence."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megaarch").setLevel(logging.INFO)
    try:
        return COMMANDS[options.command](options)
    except (ValueError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        if _speaks() or isinstance(error, OSError):
            print(f"megaarch: {_sentence(error)}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if _speaks():
            print(f"megaarch: {stop}", file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else REQUEUE
    except KeyboardInterrupt:
        print("megaarch: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _speaks() -> bool:
    """Whether this process prints: of a job's processes, the first. A user's mistake is the same
    on all of them."""
    from megaarch.parallel import launch

    return launch.find()[1].rank == 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def read(options: argparse.Namespace) -> config.Raw:
    """The raw configuration of a command: file, then --data and --tokenizer, then --set."""
    raw = config.read_yaml(options.config)
    for flag, path in (("data", "data.source"), ("tokenizer", "data.tokenizer")):
        if value := getattr(options, flag, None):
            config.set_path(raw, path, value)
    for text in options.set:
        config.set_path(raw, *config.parse_override(text))
    return raw


def run_train(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaarch.data.prepare import prepare
    from megaarch.parallel import launch
    from megaarch.parallel.mesh import Grid
    from megaarch.study.display import Board, Line
    from megaarch.training.trainer import Trainer, device_of

    settings = config.resolve(read(options), options.config)
    if settings.study:
        raise config.ConfigError(["study: this is a study; run it with megaarch compare"])
    grid = Grid.join(settings, device_of(settings))
    prepared = launch.first(lambda: prepare(settings.data, settings.model.vocabulary_size))
    with Board(Console(stderr=True, quiet=not grid.is_main)) as board:
        line = Line(settings.model.preset or settings.model.architecture, board.show)
        progress = Trainer(settings, prepared, grid=grid, watch=line.step).run()
    if grid.is_main:
        print(
            f"{progress.step} steps in {progress.seconds:.1f} s, {progress.flops:.3e} FLOPs, "
            f"{progress.seen_tokens:,} tokens: {settings.logging.directory}"
        )
    launch.leave()
    return 0


def run_compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaarch.parallel import launch
    from megaarch.study import compare, report
    from megaarch.study.estimate import dry_run

    raw = read(options)
    study = config.resolve(raw, options.config).study
    if study is None:
        raise config.ConfigError(["study: is required: this configuration has no grid of cells"])
    if launch.find()[1].world_size > 1:
        raise ValueError("compare runs in one process and was started as several: start it once")
    directory = Path(options.output or Path("runs") / study.name)
    if options.dry_run:
        print(dry_run(raw, directory))
        return 0
    results = compare.compare(raw, directory, Console(stderr=True))
    report.write_page(results, directory / "report.html")
    print(report.text(results))
    print(f"\n{directory / 'report.html'}\n{directory / 'results.json'}")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    from megaarch.parallel import launch
    from megaarch.study.evaluate import evaluate_run

    found = evaluate_run(Path(options.run), options.set)
    launch.leave()
    if not _speaks():
        return 0
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for name in ("continuation_bits_per_byte", "middle_bits_per_byte", "choice_accuracy"):
            value = found[name]
            items = found["items"][name.partition("_")[0]]
            print(f"{name:<28} {'-' if value is None else f'{value:.4f}'}   {items} items")
    return 0


def run_report(options: argparse.Namespace) -> int:
    from megaarch.study import report

    path = Path(options.run) / "results.json"
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: give the folder of a study that megaarch compare has run"
        ) from None
        report.check(results)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a results.json of this version ({type(error).__name__}: {error}): run "
            "megaarch compare again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if options.text:
        print(report.text(results))
    elif options.csv:
        print(report.csv(results), end="")
    elif options.latex:
        print(report.latex(results))
    elif options.figures:
        for written in report.write_figures(results, Path(options.figures)):
            print(written)
    else:
        report.write_page(results, path.with_name("report.html"))
        print(path.with_name("report.html"))
    return 0


def run_describe(options: argparse.Namespace) -> int:
    from megaarch.study.describe import describe_all, table

    cells = describe_all(read(options))
    print(json.dumps({"cells": cells}, indent=1) if options.json else table(cells))
    return 0


COMMANDS = {
    "train": run_train,
    "compare": run_compare,
    "evaluate": run_evaluate,
    "report": run_report,
    "describe": run_describe,
}
