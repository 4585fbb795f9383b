"""`megaarch status`: how far a study or a run is."""

import argparse
from dataclasses import asdict
from pathlib import Path

from megaarch.cli.options import Adder, print_result


def add(command: Adder) -> None:
    state = command(
        "Print how far a study or a run is",
        "Each cell's state, progress, throughput and time left, from the study's folder and, on a "
        "cluster, from squeue; of a run of megaarch train the same, from its folder.",
    )
    state.add_argument("run", metavar="RUN", help="a study's folder, or a run's")
    state.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from megaarch.cluster import status

    states = status.status(Path(options.run))
    print_result(options, {"states": list(map(asdict, states))}, status.table(states))
    return 0
