"""The account: what a training step of each preset costs on a GPU, by a roofline, without one.

make fake-cuda                                   all of it, with its checks
python -m tests.fake_cuda.account gpt t5         in a process that libcuda.cpp is preloaded into
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megaarch.config import catalogue
from megaarch.model import flops
from tests.fake_cuda import device, rates, step
from tests.fake_cuda.record import Kernel

HEADER = (
    f"{'preset':<11}{'ms':>7}{'MFU':>7}{'kernels':>9}{'GB':>7}{'products':>10}{'attention':>11}"
    f"{'head':>7}{'layers':>8}{'clip':>6}{'optimizer':>11}  waits"
)


def record(found: step.Step) -> dict[str, Any]:
    """A step's figures. Times in milliseconds, by the roofline."""
    kernels = found.recorder.kernels
    cost = flops.training(found.settings.model, found.counts)
    seconds = sum(k.seconds for k in kernels)
    return {
        "ms": round(1e3 * seconds, 2),
        "mfu": round(cost / seconds / rates.PEAK, 4),
        "exact_flops": cost,
        "kernels": sum(k.launches for k in kernels),
        "graphs": len(found.plans),
        "bytes": sum(k.bytes for k in kernels),
        "waits": {f"{at}: {what}": n for (at, what), n in found.recorder.waits.items()},
        "ms_by_part": _milliseconds(kernels, part),
        "ms_by_phase": _milliseconds(kernels, lambda k: k.phase),
        "operators": operators(kernels),
    }


def part(kernel: Kernel) -> str:
    """Where a kernel is told apart in the table."""
    if kernel.kind in ("products", "attention"):
        return kernel.kind
    if kernel.phase in ("clip", "optimizer", "copy"):
        return kernel.phase
    return "head" if kernel.head else "layers"


def operators(kernels: Iterable[Kernel], most: int = 40) -> list[dict[str, Any]]:
    """The operators that take the most time, by phase and name."""
    alike: dict[tuple, list[Kernel]] = {}
    for kernel in kernels:
        alike.setdefault((kernel.phase, part(kernel), kernel.name), []).append(kernel)
    found = [
        {
            "phase": at,
            "part": where,
            "name": name,
            "kernels": sum(k.launches for k in group),
            "ms": round(1e3 * sum(k.seconds for k in group), 3),
            "gb": round(sum(k.bytes for k in group) / 1e9, 3),
            "tflop": round(sum(k.flops for k in group) / 1e12, 3),
        }
        for (at, where, name), group in alike.items()
    ]
    return sorted(found, key=lambda row: -row["ms"])[:most]


def line(name: str, found: dict[str, Any]) -> str:
    by = Counter(found["ms_by_part"])
    columns = zip(
        ("products", "attention", "head", "layers", "clip", "optimizer"), (10, 11, 7, 8, 6, 11)
    )
    return (
        f"{name:<11}{found['ms']:>7.1f}{found['mfu']:>7.3f}{found['kernels']:>9,}"
        f"{found['bytes'] / 1e9:>7.0f}"
        + "".join(f"{by[column]:>{width}.1f}" for column, width in columns)
        + f"  {found['waits'] or 'none'}"
    )


def _milliseconds(kernels: Iterable[Kernel], key) -> dict[str, float]:
    total = Counter()
    for kernel in kernels:
        total[key(kernel)] += 1e3 * kernel.seconds
    return {name: round(ms, 3) for name, ms in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="*", default=list(catalogue.PRESETS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--operators", type=int, default=0, help="show so many of each preset")
    parser.add_argument("--out", type=Path, help="a JSON file")
    asked = parser.parse_args()
    if reason := device.obstacle():
        parser.exit(2, f"{reason}\n")
    results = {}
    print(HEADER, flush=True)
    for preset in asked.presets:
        results[preset] = record(step.run(step.benchmark(preset, asked.overrides)))
        print(line(preset, results[preset]), flush=True)
        for row in results[preset]["operators"][: asked.operators]:
            print(
                f"    {row['phase']:<10}{row['part']:<11}{row['name']:<52}{row['kernels']:>6}"
                f"{row['ms']:>9.2f} ms {row['gb']:>8.1f} GB {row['tflop']:>8.1f} TFLOP"
            )
        if asked.out:
            write(asked.out, {"steps": results, "overrides": asked.overrides})


def write(path: Path, found: dict[str, Any]) -> None:
    """The figures with what they rest on: versions, rates, configuration."""
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "configuration": step.CONFIGURATION,
        "rates": {
            "peak": rates.PEAK,
            "memory": rates.MEMORY,
            "launch": rates.LAUNCH,
            "products": rates.PRODUCTS,
            "attention": {k: vars(v) for k, v in rates.ATTENTION.items()},
        },
    }
    path.write_text(json.dumps(head | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
