"""Where a run happened: hardware, versions and commit, for every result that is written."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import megaarch
from megaarch.evaluation.record_schema import Hardware, Machine
from megaarch.kernels import cpu_features


def machine() -> Machine:
    """Hardware, versions and commit of this process."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return Machine(
        hardware=Hardware(
            cpu=cpu_features.name(),
            cores=len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            memory_gib=round(_memory() / 2**30, 1),
        ),
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "megaarch": megaarch.__version__,
        },
        commit=commit(),
    )


def environment() -> dict[str, Any]:
    """Returns `machine()` as JSON, for the records of benchmarks."""
    return machine().as_json()


def command() -> str:
    """The command that this process was given."""
    return shlex.join(["megaarch", *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the checkout that this package runs from, marked where it has changes."""
    root = Path(megaarch.__file__).parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
