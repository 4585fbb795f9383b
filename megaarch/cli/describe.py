"""`megaarch describe`: what each cell of a configuration is."""

import argparse
import json
from dataclasses import asdict

from megaarch.cli.options import Adder, config_arguments, read


def add(command: Adder) -> None:
    describe = command(
        "describe",
        "Print what each cell is: parameters, FLOPs and tokens of a row, lengths",
    )
    config_arguments(describe)
    describe.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from megaarch.study.describe import describe_all, table

    cells = describe_all(read(options))
    print(
        json.dumps({"cells": list(map(asdict, cells))}, indent=1) if options.json else table(cells)
    )
    return 0
