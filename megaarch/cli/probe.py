"""`megaarch probe`: what is measured inside trained runs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaarch.cli.options import RUN_HELP, Adder, check_ranges, print_result, set_argument
from megaarch.config.suggest import flatten
from megaarch.errors import UserError

if TYPE_CHECKING:
    from megaarch.probes.catalogue import Probed

PROBES = """\
probes of runs:
  rank         numerical, stable and effective rank of attention
  position     how far a token's place can be read off its hidden state
  difficulty   cost and number of targets, and what frozen states know
  in_context   whether demonstrations change attention as finetuning does
  dialogue     FLOPs of a dialogue's turns under each policy of its cache
probes that need no run:
  regression   in-context linear regression by models of each mask
  masks        attention's throughput under each mask against causal's
"""
MANY = 60  # estimates of a cell


def add(command: Adder) -> None:
    probe = command(
        "Look inside trained runs, for the arguments about decoders",
        "Runs that differ in their seed alone are put together; docs/why.md says what each measures.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=PROBES,
    )
    probe.add_argument("name", metavar="NAME", help="of a probe, below")
    probe.add_argument("runs", metavar="RUN", nargs="*", help=RUN_HELP)
    probe.add_argument(
        "--study",
        metavar="DIR",
        help="all finished cells of a study; what is found goes to DIR/probes and into its report",
    )
    probe.add_argument("--rows", metavar="N", type=int, default=32, help="of held-out text (32)")
    probe.add_argument(
        "--length", metavar="N", type=int, help="tokens of a row (as the run has, 128 at most)"
    )
    probe.add_argument(
        "--tasks",
        metavar="TASK",
        nargs="+",
        action="extend",
        default=[],
        help="NAME.task.yaml or a folder of them, for difficulty and in_context (with --study its own)",
    )
    probe.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn (0)")
    probe.add_argument("--json", action="store_true", help="print one JSON object")
    set_argument(probe)


def run(options: argparse.Namespace) -> int:
    from megaarch.probes import catalogue

    if options.name not in catalogue.PROBES:
        raise UserError(
            f"there is no probe {options.name!r}: choose among {', '.join(catalogue.PROBES)}"
        )
    check_ranges(options, rows=(2, 100_000), length=(4, 1 << 20), seed=(0, 1 << 63))
    of_runs = catalogue.PROBES[options.name].of_runs
    if of_runs and bool(options.runs) == (options.study is not None):
        raise UserError("give the folders of runs, or --study DIR")
    if not of_runs and options.runs:
        raise UserError(f"{options.name} looks at no run: give --study DIR alone, or nothing")
    runs, tasks = [Path(run) for run in options.runs], options.tasks
    if options.study is not None:
        runs, of_study = finished_runs(Path(options.study), of_runs)
        tasks = tasks or of_study
    how = catalogue.Options(options.rows, options.length, options.seed, tuple(tasks))
    found = catalogue.run(
        options.name, runs, how, options.set, lambda words: print(words, file=sys.stderr)
    )
    if options.study is not None:
        print(catalogue.write(Path(options.study), found), file=sys.stderr)
    print_result(options, found.model_dump(mode="json"), table(found))
    return 0


def finished_runs(study: Path, of_runs: bool) -> tuple[list[Path], list[str]]:
    """Returns the folders of a study's finished cells, if a probe is of runs, and the study's tasks. Finetuned
    cells are left out: text is not what they read, and no argument asks for what is inside them. UserError where no
    cell is finished."""
    from megaarch.config.catalogue import OBJECTIVES
    from megaarch.study import sweep
    from megaarch.study.folder import StudyFolder, load_config

    folder = StudyFolder.open(load_config(study), study)
    if not of_runs:
        return [], folder.study.evaluation.tasks
    folder = sweep.chosen(folder)
    found = [(cell, folder.finished(cell)) for cell in folder.cells]
    done = [cell for cell, record in found if record and record.result]
    of_text = [c for c in done if not OBJECTIVES[c.settings.data.objective].of_pairs]
    left = dict.fromkeys(cell.name for cell in done if cell not in of_text)
    if left:
        print(f"Finetuned, so left out: {', '.join(left)}", file=sys.stderr)
    runs = [cell.folder for cell in of_text]
    if not runs:
        raise UserError(f"{study} has no finished cell: run megaarch compare first")
    return runs, folder.study.evaluation.tasks


def table(found: "Probed") -> str:
    """The estimates of every cell with their intervals; of many, those that are not of a single layer
    or head. Of a probe that counts and estimates nothing, its counts."""
    from megaarch.probes.catalogue import estimates

    lines = []
    for name, record in found.cells.items():
        if not estimates(record):
            lines += [name, found.probe, *counts(record.model_dump()), ""]
            continue
        known = [(path, e) for path, e in estimates(record) if e.value is not None]
        rows = [row for row in known if len(known) <= MANY or "[" not in row[0]]
        wide = max((len(path) for path, _ in rows), default=0)
        lines += [name, f"{found.probe:<{wide}}  {'value':>9}  {'95% interval':<22}  rows"]
        for path, estimate in rows:
            low, high = estimate.ends
            interval = f"{low:.4g} to {high:.4g}"
            shown = f"{estimate.value:>9.4g}  {interval:<22}  {estimate.items:>4}"
            lines.append(f"{path:<{wide}}  {shown}")
        if len(rows) < len(known):
            lines.append(f"{len(known) - len(rows)} more, by layer and head, with --json")
        lines.append("")
    return "\n".join(lines)


def counts(record: dict[str, Any]) -> list[str]:
    """A line for each number, or list of numbers, of a record."""
    flat = flatten(record)
    wide = max(map(len, flat))
    return [f"{path:<{wide}}  {_numbers(value)}" for path, value in flat.items()]


def _numbers(value: Any) -> str:
    each = value if isinstance(value, list) else [] if value in (None, {}) else [value]
    return "  ".join(f"{number:.4g}" for number in each) or "-"
