"""How often intervals hold a planted law, and how often two equal architectures are called different, which are scored
on the same documents: by intervals over runs and documents, and over runs alone.

python -m tests.scaling.simulate --draws 200 --output benchmarks/DATE-scaling-laws.json
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from megaarch.scaling import law
from megaarch.scaling.crossing import compare
from megaarch.study.environment import machine
from tests.scaling.planted import TRUTH, Documents, planted

# Deviation of a run's log L, that of the difference of two architectures by the choice of documents, runs of each size
# and budget
CASES = ((0.002, 0.0, 1), (0.002, 0.006, 1), (0.01, 0.0, 1), (0.01, 0.006, 1), (0.01, 0.006, 3))


def simulate(draws: int, resamples: int) -> list[dict]:
    return [_of_case(*case, draws, resamples) for case in CASES]


def _of_case(noise: float, shift: float, runs: int, draws: int, resamples: int) -> dict:
    hits, different, of_runs_alone = dict.fromkeys(law.NAMES, 0), 0, 0
    for study in range(draws // 2):
        held = Documents.drawn(study)
        pair = [
            planted(noise, seed, TRUTH, "ab"[seed % 2], runs, held, shift / math.sqrt(2))
            for seed in (2 * study, 2 * study + 1)
        ]
        fits = [law.fit(points, resamples, study) for points in pair]
        alone = [replace(points, sizes=None, amounts=None) for points in pair]
        for fit in fits:
            for name, (low, high) in fit.intervals().items():
                hits[name] += low <= getattr(TRUTH, name) <= high
        different += compare(*fits).different
        of_runs_alone += compare(*(law.fit(points, resamples, study) for points in alone)).different
    found = {
        "noise": noise,
        "shift": shift,
        "points": len(pair[0]),
        "documents": pair[0].documents,
        "draws": draws,
        "resamples": resamples,
        "held": {name: number / draws for name, number in hits.items()},
        "pairs": draws // 2,
        "called_different": different / (draws // 2),
        "called_different_without_documents": of_runs_alone / (draws // 2),
    }
    print(found, file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {
        "command": shlex.join(["python", "-m", "tests.scaling.simulate", *sys.argv[1:]]),
        **dict(machine()),
        "runs": simulate(options.draws, options.resamples),
    }
    text = json.dumps(found, indent=1, default=lambda record: record.model_dump())
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
