"""`megaarch dry-run`: a step of one rank of a layout, on fake tensors."""

import argparse

from megaarch.cli.options import Adder, config_arguments, print_result, read
from megaarch.cli.plan import cluster_arguments, cluster_of


def add(command: Adder) -> None:
    dry = command(
        "Run a step of one rank of a layout on fake tensors: does it fit, and what does it send",
        "In one process, without a GPU, with the trainer's own model, plan, pipeline stage and "
        "optimizer. The layout is the configuration's own or, with --gpus, the planner's best.",
    )
    config_arguments(dry)
    cluster_arguments(dry, required=False)
    dry.add_argument("--cell", metavar="NAME", help="the cell of a study, e.g. gpt/70b")
    dry.add_argument("--rank", type=int, metavar="R", help="default: one of the fullest stage")
    dry.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from megaarch.planner import display
    from megaarch.planner.cells import chosen
    from megaarch.planner.dry_run import dry_run
    from megaarch.training import memory_check

    cluster = cluster_of(options)
    settings = chosen(read(options), options.cell, cluster, options.gpus)
    memory_check.check_training(settings, cluster.gpu.memory * 1e9, options.gpu)
    found = dry_run(settings, options.rank)
    record = display.dry_record(options.cell, settings, found)
    print_result(options, record, display.dry(found))
    return 0
