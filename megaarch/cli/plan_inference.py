"""`megaarch plan-inference`: what generation costs each model on a GPU."""

import argparse

from megaarch.cli.options import Adder, config_arguments, print_result, read
from megaarch.errors import UserError


def add(command: Adder) -> None:
    plan = command(
        "Print what generation costs on a GPU: times, cache, and a dialogue by turn",
        "FLOPs and bytes are counted exactly, for every model of a study; nothing is run. "
        "docs/inference.md.",
    )
    config_arguments(plan)
    add = plan.add_argument
    add("--gpu", metavar="NAME", default="h100", help="a100, h100, ... (h100)")
    add("--batch", type=int, metavar="N", default=1, help="dialogues that share steps (1)")
    add("--prompt", type=int, metavar="N", default=512, help="tokens of each turn (512)")
    add("--answer", type=int, metavar="N", default=128, help="tokens of each answer (128)")
    add("--turns", type=int, metavar="N", default=3, help="of each dialogue (3)")
    add("--cell", metavar="PATTERN", default="*", help="the cells of these names, e.g. '*/13b'")
    add("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from megaarch.planner import inference_display as display
    from megaarch.planner.hardware import gpu
    from megaarch.planner.hardware_rates import Cluster
    from megaarch.planner.inference import Lengths, costs

    lengths = Lengths(options.prompt, options.answer, options.turns, options.batch)
    cluster = Cluster(gpu(options.gpu))
    found = list(costs(read(options), cluster, lengths, options.cell))
    reasons = [cost for _, cost in found if isinstance(cost, UserError)]
    if len(reasons) == len(found):
        raise reasons[0]
    all_of_it = found, options.gpu, cluster, lengths
    print_result(options, display.record(*all_of_it), display.tables(*all_of_it))
    return 0
