"""How often intervals hold a planted law, and how often two equal architectures are called different.

python -m tests.scaling.simulate --draws 500 --output benchmarks/DATE-scaling-laws.json
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from megaarch.scaling import law
from megaarch.scaling.crossing import compare
from megaarch.study.environment import machine
from tests.scaling.planted import TRUTH, planted

NOISES = (0.002, 0.01)  # deviations of log L


def simulate(draws: int, resamples: int) -> list[dict]:
    return [_of_noise(noise, draws, resamples) for noise in NOISES]


def _of_noise(noise: float, draws: int, resamples: int) -> dict:
    hits, different, before = dict.fromkeys(law.NAMES, 0), 0, None
    for seed in range(draws):
        fit = law.fit(planted(noise, seed), resamples, seed)
        for name, (low, high) in fit.intervals().items():
            hits[name] += low <= getattr(TRUTH, name) <= high
        if before is not None and seed % 2:
            different += compare(before, fit).different
        before = fit
        if seed % 50 == 49:
            print(
                f"noise {noise}: {seed + 1} draws, {hits}, {different}", file=sys.stderr, flush=True
            )
    return {
        "noise": noise,
        "points": len(planted(noise)),
        "draws": draws,
        "resamples": resamples,
        "held": {name: number / draws for name, number in hits.items()},
        "pairs": draws // 2,
        "called_different": different / (draws // 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=300)
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
