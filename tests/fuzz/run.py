"""A long fuzz of all readers, with its record:

python -m tests.fuzz.run --inputs 2000 --output benchmarks/DATE-fuzz.json
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from megaarch.study.environment import environment
from tests.fuzz import sound
from tests.fuzz.readers import BOUND, READERS, tried


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--inputs", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0, help="of the first input")
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    counts, faults, slowest = {name: Counter() for name in READERS}, [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        files = sound.make(Path(folder))
        for number in range(given.inputs):
            name = list(READERS)[number % len(READERS)]
            seed = given.seed + number
            outcome, seconds = tried(READERS[name], files, Path(folder) / "case", seed)
            slowest = max(slowest, seconds)
            counts[name][outcome] += 1
            if outcome not in ("accepted", "told") or seconds > BOUND:
                faults.append(
                    {"reader": name, "seed": seed, "outcome": outcome, "seconds": seconds}
                )
    record = {
        "inputs": given.inputs,
        "seed": given.seed,
        "outcomes": {name: dict(found) for name, found in counts.items()},
        "slowest_seconds": round(slowest, 3),
        "faults": faults,
        **environment(),
    }
    text = json.dumps(record, indent=1) + "\n"
    if given.output:
        given.output.write_text(text)
    print(text, end="")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
