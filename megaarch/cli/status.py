"""`megaarch status`: how far a study or a run is."""

import argparse
import json
from pathlib import Path

from megaarch.cli.options import Adder


def add(command: Adder) -> None:
    state = command(
        "status",
        "Print how far a study or a run is",
        "Each cell's state, progress, throughput and time left, from the study's folder and, on a "
        "cluster, from squeue; of a run of megaarch train the same, from its folder.",
    )
    state.add_argument("run", metavar="RUN", help="a study's folder, or a run's")
    state.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints the states of a study, or of a run."""
    from megaarch.cluster import status

    states = status.status(Path(options.run))
    print(json.dumps(status.as_json(states), indent=1) if options.json else status.table(states))
    return 0
