"""Trains models on in-context linear regression and writes what they learned (megaarch/probes/regression.py).

    python -m tools.regression [SETTING=VALUE ...] --output benchmarks/DATE-regression.json

Settings are those of `Regression`, values as in YAML: attention=softmax 'seeds=[0, 1, 2]'.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from megaarch import config
from megaarch.files import fit, write_json
from megaarch.probes.regression import Regression, measure
from megaarch.study.environment import environment


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    raw: config.Raw = {}
    for text in options.settings:
        config.set_path(raw, *config.parse_override(text))
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = measure(fit(raw, Regression, "the command line"))
    record = {
        "command": shlex.join(["python", "-m", "tools.regression", *(arguments or sys.argv[1:])]),
        **environment(),
        "seconds": round(time.perf_counter() - started),
        **found.model_dump(mode="json"),
    }
    write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
