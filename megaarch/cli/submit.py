"""`megaarch submit`: a study as SLURM jobs."""

import argparse
import shlex
from pathlib import Path

from megaarch.cli.options import Adder, read_study, study_arguments


def add(command: Adder) -> None:
    order = command(
        "Give a study to SLURM: prepare its text, run every cell, write the report",
        "Each cell is a job of its own, in the layout of its settings (parallel); cells of one "
        "layout are an array, and a cell that starts from another follows it. Cells that are "
        "preempted or out of time continue by themselves; the text must be prepared within one "
        "job. Give the same command again after a failure: what is finished stays.",
    )
    study_arguments(order)
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


def run(options: argparse.Namespace) -> int:
    from megaarch.cluster import slurm_commands, submit

    raw, directory = read_study(options)
    order = submit.Request(options.nodes, options.time, tuple(options.sbatch), options.prepare_time)
    site = slurm_commands.Site.read(
        Path(options.launch) if options.launch else slurm_commands.SCRIPTS
    )
    if options.dry_run:
        print(submit.script(raw, directory, site, order))
        return 0
    for job in submit.submit(raw, directory, site, order):
        tasks = "" if job.tasks is None else f"  {len(job.tasks)} x {job.nodes} nodes"
        print(f"{job.id:>8}  {job.name}{tasks}")
    print(f"\nmegaarch status {shlex.quote(str(directory))}")
    return 0
