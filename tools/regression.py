"""Trains models on in-context linear regression and writes what they learned
(megaarch/probes/in_context_regression.py).

    python -m tools.regression [SETTING=VALUE ...] --output benchmarks/DATE-regression.json

Settings are those of `Regression`, values as in YAML: attention=softmax 'seeds=[0, 1, 2]'.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from pydantic import ValidationError

from megaarch import config
from megaarch.cli.errors import run_command
from megaarch.cli.options import Parser
from megaarch.errors import UserError
from megaarch.files import write_json
from megaarch.probes.in_context_regression import Regression, compare
from megaarch.study.environment import environment


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Trains models on in-context linear regression and writes what they learned."
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    return run_command("regression.py", lambda: run(options, arguments or sys.argv[1:]))


def run(options: argparse.Namespace, given: list[str]) -> int:
    raw: config.Raw = {}
    for text in options.settings:
        config.set_path(raw, *config.parse_override(text))
    try:
        settings = Regression.model_validate(raw)
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]
        raise UserError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = compare(settings)
    record = {
        "command": shlex.join(["python", "-m", "tools.regression", *given]),
        **environment(),
        "seconds": round(time.perf_counter() - started),
        **found.model_dump(mode="json"),
    }
    write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
