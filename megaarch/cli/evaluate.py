"""`megaarch evaluate`: the yardsticks of a trained run."""

import argparse
import json
import sys
from pathlib import Path

from megaarch.cli.errors import is_first_process
from megaarch.cli.options import Adder, set_argument


def add(command: Adder) -> None:
    evaluate = command(
        "evaluate",
        "Score a trained run on held-out text",
        "Bits per byte of continuations and middles, and a four-way choice.",
    )
    evaluate.add_argument("run", metavar="RUN", help="a run's folder, with checkpoints in it")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    set_argument(evaluate)


def run(options: argparse.Namespace) -> int:
    from megaarch.distributed import launch
    from megaarch.study.evaluate import evaluate_run

    heldout, warnings = evaluate_run(Path(options.run), options.set)
    launch.leave()
    if not is_first_process():
        return 0
    for warning in warnings:
        print(f"megaarch: {warning}", file=sys.stderr)
    found = heldout.as_json()
    if options.json:
        print(json.dumps(found | {"warnings": warnings}, indent=1))
    else:
        for name in ("continuation_bits_per_byte", "middle_bits_per_byte", "choice_accuracy"):
            value = found[name]
            items = found["items"][name.partition("_")[0]]
            print(f"{name:<28} {'-' if value is None else f'{value:.4f}'}   {items} items")
    return 0
