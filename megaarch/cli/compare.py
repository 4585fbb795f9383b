"""`megaarch compare`: a study, or one cell or trial of it."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megaarch.cli.options import Adder, read_study, study_arguments
from megaarch.errors import UserError

if TYPE_CHECKING:
    from megaarch.study.results import CellResult, Results


def add(command: Adder) -> None:
    compare = command(
        "Run a study: every cell at the same budget, then the report",
        "Cells that are finished are kept and an interrupted one continues, so a longer list of "
        "sizes, budgets or seeds runs only what is new. Ends with a table, results.json and "
        "report.html in the study's folder.",
    )
    study_arguments(compare)
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


def trains(options: argparse.Namespace) -> bool:
    """Whether cells are run, which continue after an interruption."""
    return not (options.dry_run or options.prepare)


def run(options: argparse.Namespace) -> int:
    from megaarch.distributed import launch
    from megaarch.study import distributed_cell

    raw, directory = read_study(options)
    if options.cell is not None or options.trial is not None:
        if options.cell is not None:
            distributed_cell.run_cell(raw, directory, options.cell)
        else:
            distributed_cell.run_trial(raw, directory, options.trial)
        launch.leave()
        return 0
    if launch.find()[1].world_size > 1:
        raise UserError(
            "compare runs in one process and was started as several: start it once, or run one "
            "cell of it in several with --cell"
        )
    if options.prepare:
        distributed_cell.prepare(raw, directory)
        return 0
    # what draws a report takes a second to import, and the ranks of a cell draw none
    from rich.console import Console

    from megaarch import report
    from megaarch.probes import catalogue
    from megaarch.study import run_study
    from megaarch.study.costs import dry_run

    if options.dry_run:
        print(dry_run(raw, directory))
        return 0
    results = run_study.compare(raw, directory, Console(stderr=True))
    report.write_page(results, directory / "report.html", catalogue.read(directory))
    print(report.text(results))
    print(f"\n{directory / 'report.html'}\n{directory / 'results.json'}")
    if (run := generating(results, directory)) is not None:
        print(f'\nmegaarch generate {shlex.quote(str(run))} --prompt "The" --max-tokens 32')
    return 0


def generating(results: "Results", directory: Path) -> Path | None:
    """Returns STUDY/CELL of the cell that continues text best, those that read their prefix first; None
    where none can generate."""
    from megaarch.config.catalogue import OBJECTIVES

    def order(cell: "CellResult") -> tuple[bool, bool, float]:
        held = cell.heldout
        bits = held.continuation_bits_per_byte
        tuned = OBJECTIVES[cell.objective].of_pairs
        return tuned, held.reads_prefix is False, float("inf") if bits is None else bits

    cells = [cell for cell in results.cells if OBJECTIVES[cell.objective].comparable]
    if not cells:
        return None
    cell = min(cells, key=order)
    alone = sum(other.name == cell.name for other in results.cells) == 1
    return directory / (cell.name if alone else cell.key or cell.name)
