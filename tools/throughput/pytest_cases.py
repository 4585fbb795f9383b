"""Tests as a benchmark: one result a test, with its outcome and reason. A test that crashes, hangs or
loses the GPU is reported, and a new process goes on with the rest.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megaarch.errors import UserError
from tools.throughput import pytest_outcomes
from tools.throughput.isolate import OUT_OF_TIME, START, expired
from tools.throughput.record import Event

ROOT = Path(__file__).parents[2]
ENDS = (0, 1, 5)  # pytest's codes: passed, failed, nothing (more) to run


def run(paths: list[str], deadline: float | None, patience: float = 180.0) -> Iterator[Event]:
    """Runs the tests of `paths` by pytest. patience: seconds that a test may take. ValueError where
    pytest does not start."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes"
        while True:
            process = subprocess.Popen(_command(paths, file), cwd=ROOT)
            try:
                yield from _follow(process, file, deadline, patience)
            finally:
                process.kill()
                process.wait()
            if process.returncode in ENDS:
                return
            found = pytest_outcomes.read(file)
            begun = [test for test, entry in found.items() if entry["outcome"] is None]
            if expired(deadline):
                for test in begun or ["the rest"]:
                    yield Event({"test": test}, {"unfinished": OUT_OF_TIME})
                return
            for test in begun:
                reason = f"its process {_ending(process.returncode, patience)}"
                pytest_outcomes.Outcomes(file).write(test, "failed", reason=reason)
                yield _event(pytest_outcomes.read(file)[test])
            if not begun and process.returncode != pytest_outcomes.LOST:
                raise UserError(f"pytest ended with code {process.returncode}; see above")


def _command(paths: list[str], file: Path) -> list[str]:
    # none of the plugins that pytest.ini asks for, which may not be there
    plain = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal"]
    plain += ["--continue-on-collection-errors"]
    plugin = ["-p", "tools.throughput.pytest_outcomes", "--outcomes", str(file)]
    return [sys.executable, "-m", "pytest", *plain, *plugin, *paths]


def _follow(
    process: subprocess.Popen, file: Path, deadline: float | None, patience: float
) -> Iterator[Event]:
    """Results as they come, until the process ends or its time is up."""
    told = {test: entry["outcome"] for test, entry in pytest_outcomes.read(file).items()}
    moved = time.monotonic()
    while True:
        ended = process.poll() is not None
        for test, entry in pytest_outcomes.read(file).items():
            if test not in told or told[test] != entry["outcome"]:
                told[test], moved = entry["outcome"], time.monotonic()
                yield _event(entry)
        runs = None in told.values()  # else it imports, collects or ends
        limit = patience if runs else max(patience, START)
        if ended or expired(deadline) or time.monotonic() - moved > limit:
            return
        time.sleep(0.2)


def _ending(code: int, patience: float) -> str:
    if code == -signal.SIGKILL:
        return f"was stopped after {patience:.0f} s without an outcome"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _event(entry: dict[str, Any]) -> Event:
    """`wrong` or `skipped` says why a test did not pass."""
    head, result = {"test": entry["test"]}, dict(entry)
    del result["test"]
    reason = result.pop("reason", "")
    if entry["outcome"] in ("failed", "skipped"):
        result["wrong" if entry["outcome"] == "failed" else "skipped"] = reason
    return Event(head, result if entry["outcome"] else None)


def line(r: dict[str, Any]) -> str:
    """A result for people."""
    for word in ("skipped", "wrong", "unfinished"):
        if word in r:
            return f"{r['test']}  {word}: {r[word]}"
    return f"{r['test']}  passed"
