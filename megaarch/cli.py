"""The `megaarch` command: train, compare, evaluate, report, describe; plan and dry-run; submit, status."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from megaarch import __version__, config
from megaarch.cluster import commands as cluster
from megaarch.planner import commands as planner
from megaarch.reading import read_json
from megaarch.told import speaks, told

EPILOG = """\
examples:
  megaarch compare configs/demo.yaml                 eight architectures, equal compute, one report
  megaarch compare configs/demo.yaml --data my.jsonl --set study.budgets=[1e13]
  megaarch train configs/tiny.yaml --set model.preset=t5 training.steps=50
  megaarch describe configs/studies/wang2022.yaml --json
  megaarch report runs/demo --text
  megaarch plan configs/studies/scale.yaml --gpus 1024 --gpu h100
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
    planner.arguments(command, _config_arguments)
    cluster.arguments(command, _study_arguments)
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
    _study_arguments(compare)
    part = compare.add_mutually_exclusive_group()
    part.add_argument(
        "--dry-run",
        action="store_true",
        help="print steps, tokens, epochs and disk of each cell, and the hours of one-process "
        "cells from a timed step; train nothing",
    )
    part.add_argument("--prepare", action="store_true", help="prepare the text and end")
    part.add_argument(
        "--cell",
        metavar="CELL",
        help="run this cell alone, in its own layout: its name, key, or "
        "number from 0. Start it with srun, mpirun or torchrun; megaarch report --gather follows",
    )
    part.add_argument(
        "--trial", metavar="N", type=int, help="run trial N of the study's sweep alone, likewise"
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
    report.add_argument(
        "--gather",
        action="store_true",
        help="first make results.json of the cells that are finished (where each ran by itself)",
    )
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


def _study_arguments(command: argparse.ArgumentParser) -> None:
    _config_arguments(command)
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
    return told("megaarch", lambda: COMMANDS[options.command](options), options.debug)


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
    raw = read(options)
    study = config.resolve(raw, options.config).study
    if study is None:
        raise config.ConfigError(["study: is required: this configuration has no grid of cells"])
    return raw, Path(options.output or Path("runs") / study.name)


def run_train(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaarch.data.prepare import prepare
    from megaarch.parallel import launch
    from megaarch.parallel.heartbeat import Heartbeat
    from megaarch.parallel.mesh import Grid
    from megaarch.study import lock
    from megaarch.study.display import Board, Line
    from megaarch.training import fits
    from megaarch.training.progress import Limit
    from megaarch.training.trainer import Trainer, device_of

    settings = config.resolve(read(options), options.config)
    if settings.study:
        raise config.ConfigError(["study: this is a study; run it with megaarch compare"])
    Limit.of(settings.training)  # or says what lacks, ahead of the data
    device = device_of(settings)
    fits.check(settings, device)
    grid = Grid.join(settings, device)
    directory = Path(settings.logging.directory)
    for folder in (directory, directory / "checkpoints"):
        if folder.exists() and not folder.is_dir():
            raise config.ConfigError([f"logging.directory: {folder} is a file"])
    with Heartbeat(grid, settings.training) as heart:
        prepared = launch.first(lambda: prepare(settings.data, settings.model.vocabulary_size))
        with Board(Console(stderr=True, quiet=not grid.is_main)) as board:
            line = Line(settings.model.preset or settings.model.architecture, board.show)
            with lock.alone(directory, "run", grid):
                trainer = Trainer(settings, prepared, grid=grid, heart=heart, watch=line.step)
                progress = trainer.run()
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
    from megaarch.study import compare, report, task
    from megaarch.study.estimate import dry_run

    raw, directory = read_study(options)
    if options.cell is not None or options.trial is not None:
        return _run_task(options, raw, directory)
    if launch.find()[1].world_size > 1:
        raise ValueError(
            "compare runs in one process and was started as several: start it once, or run one "
            "cell of it in several with --cell"
        )
    if options.prepare:
        task.prepare(raw, directory)
        return 0
    if options.dry_run:
        print(dry_run(raw, directory))
        return 0
    results = compare.compare(raw, directory, Console(stderr=True))
    report.write_page(results, directory / "report.html")
    print(report.text(results))
    print(f"\n{directory / 'report.html'}\n{directory / 'results.json'}")
    return 0


def _run_task(options: argparse.Namespace, raw: config.Raw, directory: Path) -> int:
    from megaarch.parallel import launch
    from megaarch.study import task

    if options.trial is not None:
        task.run_trial(raw, directory, options.trial)
    else:
        task.run_cell(raw, directory, options.cell)
    launch.leave()
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    from megaarch.parallel import launch
    from megaarch.study.evaluate import evaluate_run

    found = evaluate_run(Path(options.run), options.set)
    launch.leave()
    if not speaks():
        return 0
    for warning in found["warnings"]:
        print(f"megaarch: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for name in ("continuation_bits_per_byte", "middle_bits_per_byte", "choice_accuracy"):
            value = found[name]
            items = found["items"][name.partition("_")[0]]
            print(f"{name:<28} {'-' if value is None else f'{value:.4f}'}   {items} items")
    return 0


def run_report(options: argparse.Namespace) -> int:
    from megaarch.study import compare, report

    path = Path(options.run) / "results.json"
    if options.gather:
        compare.gather(compare.recall(path.parent), path.parent)
    try:
        results = read_json(path)
        report.check(results)
        _show_report(results, options, path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: give the folder of a study that megaarch compare has run, or "
            "add --gather where its cells ran by themselves"
        ) from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a results.json of this version ({type(error).__name__}: {error}): run "
            "megaarch compare again"
        ) from error
    return 0


def _show_report(results: dict, options: argparse.Namespace, path: Path) -> None:
    from megaarch.study import report

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


def run_describe(options: argparse.Namespace) -> int:
    from megaarch.study.describe import describe_all, table

    cells = describe_all(read(options))
    print(json.dumps({"cells": cells}, indent=1) if options.json else table(cells))
    return 0


def run_submit(options: argparse.Namespace) -> int:
    return cluster.run_submit(options, *read_study(options))


def run_plan(options: argparse.Namespace) -> int:
    return planner.run_plan(options, read(options))


def run_dry_run(options: argparse.Namespace) -> int:
    return planner.run_dry_run(options, read(options))


COMMANDS = {
    "train": run_train,
    "compare": run_compare,
    "evaluate": run_evaluate,
    "report": run_report,
    "describe": run_describe,
    "plan": run_plan,
    "dry-run": run_dry_run,
    "submit": run_submit,
    "status": cluster.run_status,
}
