"""`megaarch evaluate`: the yardsticks of a trained run."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megaarch.cli.errors import is_first_process
from megaarch.cli.options import RUN_HELP, Adder, print_result, set_argument

if TYPE_CHECKING:
    from megaarch.evaluation.heldout_scores import Heldout
    from megaarch.lm_eval.evaluate import Found


def add(command: Adder) -> None:
    evaluate = command(
        "Score a trained run on held-out text",
        "Bits per byte of continuations by length and of middles, what a wrong prefix costs more, and a "
        "four-way choice; with --tasks accuracy by rank classification. docs/yardsticks.md says what each "
        "measures.",
    )
    evaluate.add_argument("run", metavar="RUN", help=RUN_HELP)
    evaluate.add_argument(
        "--tasks",
        metavar="TASK",
        nargs="+",
        action="extend",
        default=[],
        help="tasks to score as well: what is on disk is a NAME.task.yaml or a folder of them, any other "
        "name one of lm-evaluation-harness (docs/tasks.md)",
    )
    evaluate.add_argument(
        "--include-path",
        metavar="DIR",
        help="tasks and groups of lm-evaluation-harness beside its own",
    )
    evaluate.add_argument(
        "--num-fewshot",
        metavar="K",
        type=number_of_shots,
        help="answered examples before a question (default: 0, or as a task of the harness has it)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    set_argument(evaluate)


def number_of_shots(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 7):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of examples, from 0")
    return int(text)


def run(options: argparse.Namespace) -> int:
    from megaarch.distributed import launch
    from megaarch.evaluation.tasks import by_place
    from megaarch.study.evaluate_run import evaluate_run

    run, shots = Path(options.run), options.num_fewshot
    paths, names = by_place(options.tasks)
    given = [f"study.evaluation.tasks={json.dumps(paths)}"] if paths else []
    given.append(f"study.evaluation.shots={shots or 0}")
    tasks = None
    if names:
        from megaarch.lm_eval.evaluate import Tasks

        tasks = Tasks(names, options.include_path)  # said before anything is scored
    heldout, warnings = evaluate_run(run, [*options.set, *given])
    harness = tasks.evaluate(run, shots) if tasks else []
    launch.leave()
    if not is_first_process():
        return 0
    for warning in warnings:
        print(f"megaarch: {warning}", file=sys.stderr)
    more = {"harness": [asdict(each) for each in harness]} if names else {}
    record = heldout.as_json() | more | {"warnings": warnings}
    print_result(options, record, "\n".join([*panel(heldout), *harness_panel(harness)]))
    return 0


def harness_panel(harness: "Sequence[Found]") -> list[str]:
    """The metrics of lm-evaluation-harness as a table, with 95% intervals; empty where there are none."""
    if not harness:
        return []
    from megaarch.evaluation.confidence_intervals import NORMAL_95

    lines = ["", f"{'lm-evaluation-harness':<28}{'metric':<22}value, 95% interval"]
    for found in harness:
        interval = None
        if found.error is not None:
            interval = [found.value + side * NORMAL_95 * found.error for side in (-1, 1)]
        lines.append(f"{found.task:<28}{found.metric:<22}{_shown(found.value, interval)}")
    return lines


def panel(heldout: "Heldout") -> list[str]:
    """The yardsticks as a table: values, 95% intervals and numbers of items."""
    lines = [f"{'':<14}{'value, 95% interval':<26}{'items':>6}"]
    for name, unit in (
        ("continuation_bits_per_byte", "bits per byte"),
        ("middle_bits_per_byte", "bits per byte"),
        ("choice_accuracy", "share right, of four"),
    ):
        kind = name.partition("_")[0]
        shown = _shown(getattr(heldout, name), heldout.interval(name))
        lines.append(f"{kind:<14}{shown:<26}{heldout.items[kind]:>6}  {unit}")
    if heldout.continuation:
        lines += ["", f"{'continuation':<14}{'bits per byte':<26}{'prefix gain':<26}{'items':>6}"]
    for length, found in heldout.continuation.items():
        value = _shown(found.bits_per_byte, found.interval)
        gain = _shown(found.prefix_gain, found.prefix_gain_interval)
        name = f"{length:>3} token{'s' * (length != '1')}"
        lines.append(f"{name:<14}{value:<26}{gain:<26}{found.items:>6}")
    if heldout.tasks:
        lines += ["", f"{'task':<22}{'accuracy, 95% interval':<26}{'chance':>6}{'items':>7}"]
    for name, found in heldout.tasks.items():
        chance = "-" if found.chance is None else f"{found.chance:.3f}"
        value = _shown(found.accuracy, found.interval)
        exact = "" if found.exact_match is None else f"  exact match {found.exact_match:.4f}"
        lines.append(f"{name:<22}{value:<26}{chance:>6}{found.items:>7}{exact}")
    if heldout.reads_prefix is not None:
        reads = "above 0: it reads its prefix"
        above = reads if heldout.reads_prefix else "not above 0: it may not read its prefix"
        lines += ["", f"The prefix gain of the longest continuation is {above}."]
    if not heldout.comparable:
        lines += ["", "A pseudo-likelihood: its continuations compare with no other objective's."]
    return lines


def _shown(value: float | None, interval: list[float] | None) -> str:
    ends = "" if interval is None else f"  {interval[0]:.4f} to {interval[1]:.4f}"
    return ("-" if value is None else f"{value:.4f}") + ends
