"""A long fuzz of all readers and all commands, with its record:

python -m tests.fuzz.run --inputs 2000 --output benchmarks/DATE-fuzz.json
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

from megaarch.study.environment import environment
from tests.fuzz import flags, readers, sound

FINE = ("accepted", "told")
NAMES = [*readers.READERS, *flags.COMMANDS]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--inputs", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0, help="of the first input")
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    counts, faults = {name: Counter() for name in NAMES}, []
    slowest = dict.fromkeys(NAMES, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        files = sound.make(Path(folder))
        flags.warm(files, Path(folder) / "case")
        one = partial(_one, files, Path(folder), given.seed)
        fork = multiprocessing.get_context("fork")  # nothing is built twice
        with ProcessPoolExecutor(given.processes, mp_context=fork) as pool:
            for name, outcome, seconds, about in pool.map(one, range(given.inputs)):
                slowest[name] = max(slowest[name], round(seconds, 3))
                counts[name][outcome if outcome in FINE else "fault"] += 1
                if outcome not in FINE:
                    faults.append({"name": name, "outcome": outcome} | about)
                    print(json.dumps(faults[-1]), file=sys.stderr, flush=True)
    record = {
        "command": shlex.join(["python", "-m", "tests.fuzz.run", *sys.argv[1:]]),
        "inputs": given.inputs,
        "seed": given.seed,
        "outcomes": {name: dict(found) for name, found in counts.items()},
        "slowest_seconds": slowest,
        "faults": faults,
        **environment(),
    }
    text = json.dumps(record, indent=1) + "\n"
    if given.output:
        given.output.write_text(text)
    print(text, end="")
    return bool(faults)


def _one(files: Path, folder: Path, first: int, number: int) -> tuple[str, str, float, dict]:
    """Name, outcome, seconds and all that makes input `number`, readers and commands in turns."""
    name, seed = NAMES[number % len(NAMES)], first + number // len(NAMES)
    case = folder / f"case-{os.getpid()}"
    if name in flags.COMMANDS:
        outcome, seconds, arguments = flags.tried(flags.COMMANDS[name], files, case, seed)
        return name, outcome, seconds, {"seed": seed, "arguments": arguments}
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        outcome, seconds = readers.tried(readers.READERS[name], files, case, seed)
    if seconds > readers.BOUND:
        outcome = f"takes {seconds:.0f} s"
    return name, outcome, seconds, {"seed": seed}


if __name__ == "__main__":
    sys.exit(main())
