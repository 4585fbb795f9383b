"""What a benchmark writes: its results, and on what, with what and by which command they came."""

import json
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megaarch.study.environment import environment

PACKAGES = (
    "transformers",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
)
# Dense bf16 FLOP/s of NVIDIA's data sheets (SXM parts), by a part of the device's name.
PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}


def record(kind: str, settings: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole record of one run."""
    found = environment()
    found["hardware"]["threads"] = torch.get_num_threads()
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
        "results": results,
    }


def write(found: dict[str, Any], directory: Path) -> Path:
    """Writes a record as JSON, under its kind, device and date; never over another one."""
    directory.mkdir(parents=True, exist_ok=True)
    device = (found["hardware"]["gpu"] or "cpu").lower().replace(" ", "-")
    stem = f"{found['date']}-{found['benchmark']}-{device}"
    number = 1
    while True:
        path = directory / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            with path.open("x") as file:
                json.dump(found, file, indent=1)
                file.write("\n")
            return path
        except FileExistsError:
            number += 1


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s that utilization is a share of, and where the figure comes from: a data sheet's dense
    bf16, or, for a device without one here, a product of two matrices timed now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAKS.items():
            if part in name:
                return flops, f"data sheet of {part}, dense bf16"
    return matmul_flops(device), "measured: fp32 product of two 1024 x 1024 matrices"


def matmul_flops(device: torch.device, size: int = 1024, repetitions: int = 8) -> float:
    """The best of several fp32 matrix products."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
