"""`megaarch lm-eval`: lm-evaluation-harness, with the model `megaarch`."""

import argparse

from megaarch.cli.options import Adder


def add(command: Adder) -> None:
    lm_eval = command(
        "lm-evaluation-harness over a trained run",
        "Takes all arguments of `lm_eval`, and knows its model megaarch: --model megaarch --model_args "
        "run=RUN; docs/tasks.md.",
        prefix_chars="\0",  # no argument is ours, not even --help
        add_help=False,
    )
    lm_eval.add_argument("arguments", metavar="ARGUMENT", nargs="*", help="of lm_eval")


def run(options: argparse.Namespace) -> int:
    from megaarch.distributed import launch
    from megaarch.lm_eval.command import run_lm_eval

    code = run_lm_eval(options.arguments)
    launch.leave()
    return code
