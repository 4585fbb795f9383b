"""A study planned and dry-run cell by cell: one record, and the tables of docs/planning.md.

    python -m tools.planning.at_scale benchmarks/2026-12-01-scale.json

prints the tables of a record. With `--study STUDY --gpus N --gpu NAME --sizes 70b 175b` it makes the
record first: every cell planned, and those of the named sizes dry-run, each by the command that a
person would give, in a process of its own. A record that was left half made is continued. With
`--recount` it counts memory and time of the recorded layouts again, as the planner does today, and
dry-runs those of the named sizes again; the layouts stay.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megaarch import config
from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser
from megaarch.config.schema import Settings
from megaarch.errors import UserError
from megaarch.files import Schema, fit, parse_json, read_json
from megaarch.planner import display
from megaarch.planner.cells import cells
from megaarch.planner.dry_run import dry_run
from megaarch.planner.hardware import gpu
from megaarch.planner.memory import step_memory
from megaarch.planner.search import plan
from megaarch.planner.time import Cluster
from megaarch.study.environment import commit, environment

Record = dict[str, Any]
RECOUNT = "python -m tools.planning.at_scale RECORD --recount --study STUDY --sizes SIZE ..."


class _Name(Schema):
    name: str


class _Cell(Schema):
    cell: str


class _Part(Schema):
    """What is read of a record to continue it."""

    command: str
    plans: list[_Name]
    dry_runs: list[_Cell]


class _Memory(Schema):
    total: float


class _Plan(_Name):
    layout: str
    settings: dict[str, Any]
    memory: _Memory
    mfu: float
    hours: float | None
    gpu_hours: float | None


class _DryRun(_Cell):
    layout: str
    peak: Annotated[float, Field(gt=0)]
    planned: float


class _Record(_Part):
    plans: list[_Plan]
    dry_runs: list[_DryRun]


def read(path: Path, form: type[Schema] = _Record) -> Record:
    """A record. ValueError where it is damaged."""
    record = read_json(path)
    fit(record, form, path)
    return record


def make(path: Path, study: str, cluster: list[str], sizes: list[str]) -> Record:
    """The record, kept in `path` after each command. ValueError with what a command that fails says."""
    ask_plan = ["plan", study, *cluster, "--json"]
    if path.exists():
        record = read(path, _Part)
        if record["command"] != _shown(ask_plan):
            raise UserError(f"{path} is of another command: {record['command']}")
    else:
        record = {"command": _shown(ask_plan), **environment(), **_ask(ask_plan), "dry_runs": []}
    done = {found["cell"] for found in record["dry_runs"]}
    for cell in [found["name"] for found in record["plans"]]:
        _write(path, record)
        if cell.rpartition("/")[2] in sizes and cell not in done:
            ask = ["dry-run", study, "--cell", cell, *cluster, "--json"]
            record["dry_runs"].append({"command": _shown(ask), "commit": commit(), **_ask(ask)})
    _write(path, record)
    return record


def layouts(record: Record, study: str) -> dict[str, Settings]:
    """Maps each cell of the study to its settings in the recorded layout."""
    chosen = {found["name"]: found["settings"] for found in record["plans"]}
    found = {}
    for name, cell in cells(config.read_yaml(study)).items():
        given = cell.settings.model_dump(mode="json", by_alias=True, exclude={"study"})
        for path, value in chosen[name].items():
            config.set_path(given, path, value)
        found[name] = config.resolve(given)
    return found


def recount(path: Path, study: str, gpus: int, kind: str, sizes: Sequence[str] = ()) -> Record:
    """The record with memory and time of its layouts as they are counted today, and with the dry
    runs of these sizes made anew."""
    record = read(path)
    cluster, chosen = Cluster(gpu(kind)), layouts(record, study)
    record["plans"] = [
        display.record(name, plan(settings, gpus, cluster, step_memory(settings)))
        for name, settings in chosen.items()
    ]
    record["recounted"] = commit()
    asked = [run for run in record["dry_runs"] if run["cell"].rpartition("/")[2] in sizes]
    # each in a process of its own: torch keeps what it knows of a process group's name
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1), **fresh) as pool:
        names = [run["cell"] for run in asked]
        for run, again in zip(asked, pool.map(_dry, names, map(chosen.get, names))):
            run |= {"command": RECOUNT, "commit": commit(), **again}
            _write(path, record)
    _write(path, record)
    return record


def _dry(cell: str, settings: Settings) -> Record:
    return display.dry_record(cell, settings, dry_run(settings))


def _shown(arguments: list[str]) -> str:
    return shlex.join(["megaarch", *arguments])


def _ask(arguments: list[str]) -> Record:
    command = [sys.executable, "-m", "megaarch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{_shown(arguments)} fails: {done.stderr.strip()[-500:]}")
    return parse_json(done.stdout, f"what {_shown(arguments)} prints")


def _write(path: Path, record: Record) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def plans(record: Record) -> str:
    """The layout of each cell, and what its whole budget takes."""
    lines = [
        "| cell | layout | schedule | micro-batch | recompute | GB | MFU | GPU-hours | days |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in record["plans"]:
        chosen = found["settings"]
        pipelined = chosen["parallel.pipeline_parallel"] > 1
        lines.append(
            f"| {found['name']} | {found['layout']} "
            f"| {chosen['parallel.schedule'] if pipelined else '-'} "
            f"| {chosen['training.micro_batch_size']} | {chosen['parallel.recompute']} "
            f"| {found['memory']['total'] / 1e9:.0f} | {found['mfu']:.0%} "
            f"| {found['gpu_hours']:,.0f} | {found['hours'] / 24:.2f} |"
        )
    return "\n".join(lines)


def dry_runs(record: Record) -> str:
    """Bytes that a rank of the fullest stage holds at its peak, against the planner's."""
    lines = ["| cell | layout | peak GB | planned GB | off by |", "|---|---|---|---|---|"]
    for found in record["dry_runs"]:
        peak, planned = found["peak"], found["planned"]
        lines.append(
            f"| {found['cell']} | {found['layout']} | {peak / 1e9:.2f} | {planned / 1e9:.2f} "
            f"| {planned / peak - 1:+.1%} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="at_scale", description=(__doc__ or "").partition("\n")[0])
    top.add_argument("record", type=Path)
    top.add_argument("--study", help="make the record of this study")
    top.add_argument("--gpus", type=int, default=1024)
    top.add_argument("--gpu", default="h100")
    top.add_argument("--recount", action="store_true", help="count recorded layouts again")
    top.add_argument("--sizes", nargs="+", default=[], help="sizes whose cells are dry-run")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command("at_scale", lambda: run(options), continues=True)


def run(options: argparse.Namespace) -> int:
    if options.recount and not options.study:
        raise UserError("--recount: of which study? give --study")
    if options.recount:
        cluster = options.gpus, options.gpu
        record = recount(options.record, options.study, *cluster, options.sizes)
    elif options.study:
        cluster = ["--gpus", str(options.gpus), "--gpu", options.gpu]
        record = make(options.record, options.study, cluster, options.sizes)
    else:
        record = read(options.record)
    print(plans(record), dry_runs(record), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
