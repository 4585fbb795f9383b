"""The shell of an allocation on a site with interactive steps: commands run alone there, and what is
submitted there runs as from a login node, in folders of any name."""

import json
import shlex
import subprocess
import time

import pytest
import yaml

from megaarch.cluster.status import status
from tests.study.small_study import EVALUATION

pytestmark = [pytest.mark.timeout(1500), pytest.mark.xdist_group("slurm")]
PATIENCE = 600  # seconds, on a machine with much else to do
NAME = '50%jobs, %j "it\'s" k=v ü'


def test_the_shell_of_an_allocation_trains_and_submits(cluster, launch, raw, tmp_path, monkeypatch):
    mine = json.loads(json.dumps(raw))
    mine["logging"]["directory"] = str(tmp_path / "run")
    mine["data"]["workers"] = 0
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(mine))
    del mine["training"]["steps"], mine["logging"]["directory"]
    mine["training"]["micro_batch_size"] = 2
    cells = [{"name": "gpt", "preset": "gpt", "set": {"parallel.tensor_parallel": 2}}]
    mine["study"] = {"budgets": [3e8], "cells": cells, "evaluation": EVALUATION}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(mine))
    study, site = tmp_path / NAME, tmp_path / "launch" / NAME
    site.parent.mkdir()
    site.symlink_to(launch)
    command = "python -m megaarch"
    order = ["study.yaml", "--output", study, "--launch", site, "--nodes", "2", "--time", "60"]
    script = [
        "set -e",
        f"source {shlex.quote(str(launch / 'site.sh'))}",
        'echo "$SLURM_NTASKS tasks in the job, $SLURM_STEP_NUM_TASKS in the step"',
        f"{command} train train.yaml",
        f"{command} submit {shlex.join(map(str, order))}",
    ]
    (tmp_path / "shell.sh").write_text("\n".join(script))
    monkeypatch.chdir(tmp_path)
    # what salloc itself starts on such a site, but for the terminal
    shell = [
        "srun",
        "--interactive",
        "--preserve-env",
        "--nodes=1",
        "--ntasks=1",
        "bash",
        "shell.sh",
    ]
    taken = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--distribution=plane=2"]
    done = subprocess.run(
        ["salloc", *taken, *shell], capture_output=True, text=True, timeout=PATIENCE
    )
    assert "4 tasks in the job, 1 in the step" in done.stdout, done.stderr
    assert "6 steps in" in done.stdout and done.returncode == 0, done.stderr

    until = time.monotonic() + PATIENCE
    while not all(state.state == "done" for state in status(study)):
        logs = {path.name: path.read_text() for path in study.glob("jobs/*")}
        assert time.monotonic() < until, (status(study), logs, cluster.logs())
        assert not any(state.state == "failed" for state in status(study)), (status(study), logs)
        time.sleep(0.5)
    numbers = [job["id"] for job in json.loads((study / "jobs.json").read_text())]
    names = ["prepare-{}_0", "cells-0-tp2-{}_0", "report-{}_0"]
    wanted = {f"{name.format(i)}.log" for name, i in zip(names, numbers, strict=True)}
    assert {path.name for path in study.glob("jobs/*.log")} == wanted
    assert (study / "report.html").exists()
