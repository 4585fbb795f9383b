"""The commands of the planner: `megaarch plan` and `megaarch dry-run`."""

import argparse
import json
from collections.abc import Callable

Adder = Callable[..., argparse.ArgumentParser]
MOST_GPUS = 1 << 20


def arguments(command: Adder, config: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds both. command: of a name, a summary and more; config: adds what names a configuration."""
    _plan(command, config)
    _dry_run(command, config)


def _plan(command: Adder, config: Adder) -> None:
    plan = command(
        "plan",
        "List the best layouts on so many GPUs: memory, time, MFU, cost and what limits each",
        "The model, the data and training.global_batch_size stay; the section parallel and the "
        "micro-batch are searched. Of a study: the best layout of each cell.",
    )
    config(plan)
    _cluster(plan, required=True)
    plan.add_argument("--top", metavar="N", type=int, default=10, help="layouts to list (10)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")


def _dry_run(command: Adder, config: Adder) -> None:
    dry = command(
        "dry-run",
        "Run a step of one rank of a layout on fake tensors: does it fit, and what does it send",
        "In one process, without a GPU, with the trainer's own model, plan, pipeline stage and "
        "optimizer. The layout is the configuration's own or, with --gpus, the planner's best.",
    )
    config(dry)
    _cluster(dry, required=False)
    dry.add_argument("--cell", metavar="NAME", help="the cell of a study, e.g. gpt/70b")
    dry.add_argument("--rank", type=int, metavar="R", help="default: one of the fullest stage")
    dry.add_argument("--json", action="store_true", help="print one JSON object")


def _cluster(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument("--gpus", type=int, metavar="N", required=required, help="all GPUs")
    command.add_argument("--gpu", metavar="NAME", default="h100", help="a100, h100, ... (h100)")
    command.add_argument(
        "--gpus-per-node", type=int, metavar="N", default=8, help="GPUs of a node (8)"
    )


def run_plan(options: argparse.Namespace, raw: dict) -> int:
    """raw: the configuration."""
    from megaarch.planner import show
    from megaarch.planner.cells import plans

    found = plans(raw, _cluster_of(options), options.gpus, options.top)
    if options.json:
        print(json.dumps({"plans": [show.record(name, plan) for name, plan in found]}, indent=1))
        return 0
    best = None
    for name, plan in found:  # a large study takes minutes: each line as it is found
        if best is None:
            best = name, plan
            print(show.heading(named=bool(name)), flush=True)
        print(show.line(name, plan), flush=True)
    name, plan = best
    if not name:
        print(f"\nthe best one\n{show.details(plan)}")
    return 0


def run_dry_run(options: argparse.Namespace, raw: dict) -> int:
    """raw: the configuration."""
    from megaarch.planner import show
    from megaarch.planner.cells import chosen
    from megaarch.planner.dry_run import dry_run, fullest, planned
    from megaarch.training import fits

    cluster = _cluster_of(options)
    settings = chosen(raw, options.cell, cluster, options.gpus)
    fits.check_training(settings, cluster.gpu.memory * 1e9, options.gpu)
    rank = fullest(settings) if options.rank is None else options.rank
    expected = planned(settings, rank)
    found = dry_run(settings, rank)
    if options.json:
        print(json.dumps(show.dry_record(options.cell, settings, found, expected), indent=1))
    else:
        print(show.dry(found, expected))
    return 0


def _cluster_of(options: argparse.Namespace):
    """The machine that --gpu and --gpus-per-node describe."""
    from megaarch.planner.hardware import gpu
    from megaarch.planner.time import Cluster

    for name, value in (("gpus", options.gpus), ("gpus-per-node", options.gpus_per_node)):
        if value is not None and not 1 <= value <= MOST_GPUS:
            bound = f"at most {MOST_GPUS:,}" if value > MOST_GPUS else "at least 1"
            raise ValueError(f"--{name} {value}: must be {bound}")
    return Cluster(gpu(options.gpu), options.gpus_per_node)
