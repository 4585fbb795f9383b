"""What a benchmark writes: its results, and on what, with what and by which command they came."""

import json
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megaarch.study.environment import environment
from megaarch.training import utilization

PACKAGES = (
    "transformers",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
)


class Event(NamedTuple):
    """What benchmarks, as generators, tell. head: what a result is of. result: its figures, or why
    there are none (`wrong`, `skipped`, `unfinished`); None: it begins."""

    head: dict[str, Any]
    result: dict[str, Any] | None = None

    @property
    def key(self) -> tuple:
        return tuple(self.head.values())


EVERY = 1.0  # seconds between one writing and the next


class Record:
    """A benchmark's record on disk, whole at every moment: written aside and renamed as results come,
    so that a run which is killed leaves what it has. `complete` is true once it has ended by itself.
    """

    def __init__(self, kind: str, settings: dict[str, Any], directory: Path, name: str | None):
        """name: in the file's name, instead of the kind."""
        self.content = describe(kind, settings)
        self.directory, self.name = directory, name or kind
        self.results: dict[tuple, dict[str, Any]] = {}
        self.path: Path | None = None
        self.written, self.changed = float("-inf"), False

    def take(self, event: Event) -> None:
        """Adds an event's result, or replaces the one of the same head."""
        if event.result is not None:
            self.results[event.key] = event.head | event.result
            self.changed = True
        if self.changed and time.monotonic() - self.written > EVERY:
            self.write(complete=False)

    def extend(self, results: list[dict[str, Any]]) -> None:
        """Adds results that come all at once."""
        self.results |= {(len(self.results), n): r for n, r in enumerate(results)}

    def write(self, complete: bool) -> tuple[Path, dict[str, Any]]:
        """Writes what there is; returns where, and what."""
        path = self.path = self.path or _claim(self.content, self.name, self.directory)
        found = self.content | {"complete": complete, "results": [*self.results.values()]}
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(found, indent=1) + "\n")
        aside.replace(path)
        self.written, self.changed = time.monotonic(), False
        return path, found


def describe(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """On what, with what and by which command a benchmark runs."""
    found = environment()
    found["hardware"] |= {"threads": torch.get_num_threads()} | _gpu()
    if torch.cuda.is_available():
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "benchmark": kind,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]]),
        "system": platform.platform(),
        **found,
        "settings": settings,
    }


def _gpu() -> dict[str, Any]:
    """Driver, power limit (W) and largest clock (MHz) of the GPU in use, where nvidia-smi tells."""
    if not torch.cuda.is_available():
        return {}
    names = ("driver", "power_limit_w", "largest_clock_mhz")
    asked = "driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return dict(zip(names, done.stdout.strip().split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {"driver": None}


def _claim(found: dict[str, Any], name: str, directory: Path) -> Path:
    """A new file named by date, benchmark and device; never another record's."""
    directory.mkdir(parents=True, exist_ok=True)
    device = (found["hardware"]["gpu"] or "cpu").lower().replace(" ", "-")
    stem = f"{found['date']}-{name}-{device}"
    number = 1
    while True:
        path = directory / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            path.open("x").close()
            return path
        except FileExistsError:
            number += 1


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s that utilization is a share of, and where the figure comes from: a data sheet's dense
    bf16, or, for a device without one, a product of two matrices timed now."""
    if peak := utilization.peak_flops(device):
        return peak, f"data sheet of {torch.cuda.get_device_name(device)}, dense bf16"
    return matmul_flops(device), "measured: fp32 product of two 1024 x 1024 matrices"


def matmul_flops(device: torch.device, size: int = 1024, repetitions: int = 8) -> float:
    """The best of several fp32 matrix products."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
