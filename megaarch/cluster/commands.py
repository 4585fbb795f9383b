"""The commands of a cluster: `megaarch submit` and `megaarch status`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def arguments(
    command: Callable[..., argparse.ArgumentParser],
    study: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Adds both. command: of a name, a summary and more; study: adds what names a study."""
    order = command(
        "submit",
        "Give a study to SLURM: prepare its text, run every cell, write the report",
        "Each cell is a job of its own, in the layout of its settings (parallel); cells of one "
        "layout are an array, and a cell that starts from another follows it. Cells that are "
        "preempted or out of time continue by themselves; the text must be prepared within one "
        "job. Give the same command again after a failure: what is finished stays.",
    )
    study(order)
    order.add_argument(
        "--nodes", type=int, required=True, metavar="N", help="nodes that it may use at a time"
    )
    order.add_argument(
        "--time", required=True, metavar="T", help="time limit of each job, as sbatch takes it"
    )
    order.add_argument(
        "--prepare-time",
        default="",
        metavar="T",
        help="time limit of the job that prepares the text, which does not continue (default: "
        "that of --time)",
    )
    order.add_argument(
        "--launch",
        metavar="DIR",
        help="the folder of site.sh and the batch scripts (default: this checkout's launch)",
    )
    order.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="one more option for the jobs that train, e.g. --sbatch=--qos=long",
    )
    order.add_argument("--dry-run", action="store_true", help="print the sbatch commands and end")
    state = command(
        "status",
        "Print how far a study or a run is",
        "Each cell's state, progress, throughput and time left, from the study's folder and, on a "
        "cluster, from squeue; of a run of megaarch train the same, from its folder.",
    )
    state.add_argument("run", metavar="RUN", help="a study's folder, or a run's")
    state.add_argument("--json", action="store_true", help="print one JSON object")


def run_submit(options: argparse.Namespace, raw: dict, directory: Path) -> int:
    """raw, directory: of the study."""
    from megaarch.cluster import slurm, submit

    order = submit.Order(options.nodes, options.time, tuple(options.sbatch), options.prepare_time)
    site = slurm.Site.read(Path(options.launch) if options.launch else slurm.SCRIPTS)
    if options.dry_run:
        print(submit.script(raw, directory, site, order))
        return 0
    for job in submit.submit(raw, directory, site, order):
        tasks = "" if job.tasks is None else f"  {len(job.tasks)} x {job.nodes} nodes"
        print(f"{job.id:>8}  {job.name}{tasks}")
    print(f"\nmegaarch status {directory}")
    return 0


def run_status(options: argparse.Namespace) -> int:
    """Prints the states of a study, or of a run."""
    from megaarch.cluster import status

    states = status.status(Path(options.run))
    print(json.dumps(status.as_json(states), indent=1) if options.json else status.table(states))
    return 0
