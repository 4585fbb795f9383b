"""`megaarch describe`: what each cell of a configuration is."""

import argparse
from dataclasses import asdict

from megaarch.cli.options import Adder, config_arguments, print_result, read


def add(command: Adder) -> None:
    describe = command("Print what each cell is: parameters, FLOPs and tokens of a row, lengths")
    config_arguments(describe)
    describe.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from megaarch.study.describe import describe_all, table

    cells = describe_all(read(options))
    print_result(options, {"cells": list(map(asdict, cells))}, table(cells))
    return 0
