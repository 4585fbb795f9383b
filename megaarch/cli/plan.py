"""`megaarch plan`: the best layouts on so many GPUs."""

import argparse
import json
from dataclasses import asdict

from megaarch.cli.options import Adder, config_arguments, read
from megaarch.errors import UserError

MOST_GPUS = 1 << 20
MOST_NETWORK = 10_000.0  # GB/s


def add(command: Adder) -> None:
    plan = command(
        "List the best layouts on so many GPUs: memory, time, MFU, cost and what limits each",
        "The model, the data and the global batch stay; the section parallel and the "
        "micro-batch are searched. Of a study: the best layout of each cell, and what all take.",
    )
    config_arguments(plan)
    cluster_arguments(plan, required=True)
    plan.add_argument("--top", metavar="N", type=int, default=10, help="layouts to list (10)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")


def cluster_arguments(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument("--gpus", type=int, metavar="N", required=required, help="all GPUs")
    command.add_argument("--gpu", metavar="NAME", default="h100", help="a100, h100, ... (h100)")
    command.add_argument(
        "--gpus-per-node", type=int, metavar="N", default=8, help="GPUs of a node (8)"
    )
    command.add_argument(
        "--network",
        type=float,
        metavar="GB/S",
        help="of a node to others, a GPU's share and one way, where it is not that of NVIDIA's own nodes: two "
        "ports of 400 Gb/s for 8 GPUs are 12.5",
    )


def run(options: argparse.Namespace) -> int:
    from megaarch.planner import display
    from megaarch.planner.cells import cells, plans, totals

    raw = read(options)
    width = max(map(len, cells(raw)), default=0)
    found = []
    for name, plan in plans(raw, cluster_of(options), options.gpus, options.top):
        found.append((name, plan))
        if options.json:
            continue
        if len(found) == 1:  # a large study takes minutes: each line as it is found
            print(display.heading(width), flush=True)
        print(display.line(name, plan, width), flush=True)
    study = totals(raw, dict(found)) if width else None
    if options.json:
        record = {"plans": [display.record(name, plan) for name, plan in found]}
        print(json.dumps(record | ({"study": asdict(study)} if study else {}), indent=1))
    elif study:
        print(f"\n{display.study(study)}")
    elif found:
        print(f"\nthe best one\n{display.details(found[0][1])}")
    return 0


def cluster_of(options: argparse.Namespace):
    """The machine that --gpu, --gpus-per-node and --network describe."""
    from megaarch.planner.hardware import gpu
    from megaarch.planner.time import Cluster

    for name, value in (("gpus", options.gpus), ("gpus-per-node", options.gpus_per_node)):
        if value is not None and not 1 <= value <= MOST_GPUS:
            bound = f"at most {MOST_GPUS:,}" if value > MOST_GPUS else "at least 1"
            raise UserError(f"--{name} {value}: must be {bound}")
    kind = gpu(options.gpu)
    if options.network is not None:
        if not 0 < options.network <= MOST_NETWORK:
            raise UserError(
                f"--network {options.network:g}: must be above 0 and at most {MOST_NETWORK:,.0f} GB/s"
            )
        kind = kind.model_copy(update={"network": options.network})
    return Cluster(kind, options.gpus_per_node)
