"""Cells side by side: what becomes of them when their study is told to stop, or is killed."""

import copy
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from megaarch.checkpoint import checkpoint
from megaarch.training.preemption import REQUEUE

pytestmark = pytest.mark.slow

BOUND = 120.0  # seconds


def lines_of(cell: Path) -> int:
    path = cell / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(what, errors: Path, study: subprocess.Popen | None = None) -> None:
    """study: must not end before that."""
    deadline = time.monotonic() + BOUND
    while not what():
        ended = study is not None and study.poll() is not None
        assert not ended and time.monotonic() < deadline, errors.read_text()
        time.sleep(0.05)


def runs_of(group: int) -> list[int]:
    """Processes of a group that are there and are no mere entries."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, of_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if process.name.isdigit() and int(of_group) == group and state not in "XZ":
                found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    "number, whom, code",
    [
        (signal.SIGINT, "all", 130),  # as Ctrl-C sends it
        (signal.SIGTERM, "study", REQUEUE),
        (signal.SIGKILL, "study", -signal.SIGKILL),
    ],
)
def test_a_study_that_is_stopped_saves_its_lanes_and_begins_no_other_cell(
    number, whom, code, raw, tmp_path
):
    given = copy.deepcopy(raw)
    del given["training"]["steps"]
    cells = [{"name": f"cell{i}", "preset": "gpt"} for i in range(6)]
    items = {"documents": 4, "curve_documents": 4, "prefix_tokens": 12, "continuation_tokens": 6}
    evaluation = items | {"choices": 4, "middles": 4, "by_length": 0}
    given["study"] = {"name": "s", "budgets": [1e14], "cells": cells, "lanes": 2}
    given["study"]["evaluation"] = evaluation
    config, errors, folder = tmp_path / "study.yaml", tmp_path / "errors", tmp_path / "out"
    config.write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "megaarch", "compare", str(config), "--output", str(folder)]
    with errors.open("w") as file:
        study = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        begun = lambda: [c for c in folder.glob("cells/*/*") if lines_of(c) >= 3]  # noqa: E731
        wait_for(lambda: len(begun()) == 2, errors, study)
        os.kill(study.pid, number) if whom == "study" else os.killpg(study.pid, number)
        assert study.wait(BOUND) == code, errors.read_text()
        wait_for(lambda: not runs_of(study.pid), errors)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
        study.wait()
    assert "Traceback" not in errors.read_text()
    assert {c for c in folder.glob("cells/*/*") if lines_of(c)} == set(begun())
    for cell in begun():
        assert checkpoint.newest(cell).name == f"step-{lines_of(cell):08d}"
