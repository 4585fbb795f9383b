"""A pytest plugin: each test's outcome as a line of JSON, written at once.

    python -m pytest -p throughput.outcomes --outcomes FILE ...

A test that FILE holds already does not run again, so that a new process can go on where one was
lost. After a test that fails on a GPU which takes no more work, the process ends with code LOST.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaarch.files import Schema, fit, parse_json, read_text

LOST = 70


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", required=True, help="where the outcomes go")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(Path(str(config.getoption("--outcomes")))))


class Outcomes:
    """Writes the lines. A test that begins has one of its own: {"test", "outcome": None}."""

    def __init__(self, path: Path):
        self.path = path
        self.known = set(read(path))

    def write(self, test: str, outcome: str | None, **more: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome} | more) + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        done = [item for item in items if item.nodeid in self.known]
        items[:] = [item for item in items if item.nodeid not in self.known]
        # all cases of a `kernel` together, in the order of the kernels: one that crashes at each case
        # takes the time of those behind it alone
        kernels = list(dict.fromkeys([None, *map(_kernel, items)]))
        items.sort(key=lambda item: kernels.index(_kernel(item)))
        config.hook.pytest_deselected(items=done)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, "failed", reason=_reason(report), details=_details(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            more = {} if report.passed else {"reason": _reason(report)}
            if report.failed:
                more["details"] = _details(report)
            self.write(report.nodeid, report.outcome, seconds=round(report.duration, 3), **more)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                pytest.exit(f"the GPU takes no more work after {nodeid}: {error}", LOST)


def _kernel(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("kernel") if callspec else None


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it was skipped or failed, in one line."""
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [part.removeprefix("E").strip() for part in text.strip().splitlines() if part.strip()]
    return (lines[0] if crash else lines[-1])[:500] if lines else ""


def _details(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The end of the traceback."""
    return report.longreprtext[-2000:]


class _Line(Schema):
    test: str
    outcome: str | None


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each test; `outcome` is None where it began and did not end."""
    found = {}
    if path.exists():
        whole, _, _ = read_text(path).rpartition("\n")  # the last line may be in the making
        for line in whole.splitlines():
            entry = parse_json(line, path)
            fit(entry, _Line, path)
            if entry["outcome"] is not None or entry["test"] not in found:
                found[entry["test"]] = entry
    return found
