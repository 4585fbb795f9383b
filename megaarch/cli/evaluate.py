"""`megaarch evaluate`: the yardsticks of a trained run."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megaarch.cli.errors import is_first_process
from megaarch.cli.options import Adder, set_argument

if TYPE_CHECKING:
    from megaarch.study.results import Heldout


def add(command: Adder) -> None:
    evaluate = command(
        "evaluate",
        "Score a trained run on held-out text",
        "Bits per byte of continuations by length and of middles, what a wrong prefix costs more, and a "
        "four-way choice. docs/yardsticks.md says what each measures.",
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
        print(panel(heldout))
    return 0


def panel(heldout: "Heldout") -> str:
    """The yardsticks as a table: value, 95% interval, number of items."""
    value, interval = heldout.continuation_bits_per_byte, heldout.continuation_interval
    counts = heldout.items
    lines = [
        f"{'yardstick':<28} {'value':>7}  {'95% interval':<16} items",
        _line("continuation, bits per byte", value, interval, counts["continuation"]),
        _line(
            "middle, bits per byte",
            heldout.middle_bits_per_byte,
            heldout.middle_interval,
            counts["middle"],
        ),
        _line(
            "choice, share right",
            heldout.choice_accuracy,
            heldout.choice_interval,
            counts["choice"],
        ),
    ]
    if heldout.continuation:
        lines += ["", f"{'continuation of':<28} {'bits per byte':<25} prefix gain"]
    for length, found in heldout.continuation.items():
        unit = "token" if length == "1" else "tokens"
        gain = _line("", found.prefix_gain, found.prefix_gain_interval, found.items)[28:]
        both = _line(f"{length:>4} {unit}", found.bits_per_byte, found.interval, None)
        lines.append(both + gain)
    if heldout.reads_prefix is not None:
        said = (
            "reads its prefix" if heldout.reads_prefix else "does not show that it reads its prefix"
        )
        lines += ["", f"The run {said}: prefix gain of the longest continuation."]
    if not heldout.comparable:
        lines += ["", "A pseudo-likelihood: compare its continuations with no other objective's."]
    return "\n".join(lines)


def _line(name: str, value: float | None, interval: list[float] | None, items: int | None) -> str:
    shown = "-" if value is None else f"{value:.4f}"
    ends = "" if interval is None else f"{interval[0]:.4f} {interval[1]:.4f}"
    return f"{name:<28} {shown:>7}  {ends:<16} {'' if items is None else items}"
