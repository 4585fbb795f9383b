"""Studies on a real SLURM cluster: cells over several nodes, a preemption, a chain that stops."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from megaarch.cli import main
from megaarch.cluster.slurm_commands import seconds
from megaarch.cluster.status import State, status
from megaarch.study import lock
from megaarch.study.cells import expand
from tests.distributed.pool import Pool
from tests.study.small_study import EVALUATION, run_cells

PATIENCE = 600  # seconds that a state is waited for, on a machine with much else to do
pytestmark = [pytest.mark.timeout(1500), pytest.mark.xdist_group("slurm")]


def cell(name, preset, **more):
    layout = more.pop("layout", None)
    given = {f"parallel.{layout}": 2} if layout else {}
    return {"name": name, "preset": preset, "set": given | more.pop("set", {}), **more}


@pytest.fixture
def make(raw, tmp_path, launch):
    """make(cells, **study) -> the file of a study, and its folder; submit(...) submits it."""

    def written(cells, **training):
        mine = json.loads(json.dumps(raw))
        del mine["training"]["steps"]
        mine["training"] |= {"micro_batch_size": 2, **training}
        mine["study"] = {"budgets": [2.4e9], "cells": cells, "evaluation": EVALUATION}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(mine))
        return mine

    def submit(*more):
        study, out = str(tmp_path / "study.yaml"), str(tmp_path / "run")
        usual = ["--nodes", "4", "--time", "1:00:00", "--launch", str(launch)]
        return main(["submit", study, "--output", out, *usual, *more])

    return written, submit, tmp_path / "run"


def wait_for(cluster, run: Path, name: str, wanted) -> State:
    """The state of a cell or job, once `wanted(state)` holds."""
    until = time.monotonic() + PATIENCE
    while True:
        states = {state.name.partition("/")[0]: state for state in status(run)}
        if wanted(states[name]):
            return states[name]
        logs = "".join(f"\n{p.name}:\n{p.read_text()}" for p in sorted(run.glob("jobs/*.log")))
        assert time.monotonic() < until, (states, cluster.logs(), logs)
        time.sleep(0.2)


def test_a_study_over_four_nodes_survives_a_preemption_and_ends_in_its_report(
    cluster, make, capsys
):
    written, submit, run = make
    study = written(
        [
            cell("gpt", "gpt", layout="tensor_parallel", set={"training.global_batch_size": 2}),
            cell("t5", "t5", layout="pipeline_parallel"),
            {
                **cell("adapted", "prefix_lm", layout="data_parallel_shard", budget=6e8),
                "from": "gpt",
            },
        ]
    )
    assert submit() == 0
    shown = capsys.readouterr().out
    jobs = {job["name"]: job for job in json.loads((run / "jobs.json").read_text())}
    assert list(jobs) == ["prepare", "cells-0-tp2", "cells-0-pp2", "cells-1-fsdp2", "report"]
    assert all(str(job["id"]) in shown for job in jobs.values())
    assert submit() == 2 and "are still queued" in capsys.readouterr().err

    seen = wait_for(cluster, run, "gpt", lambda s: s.state == "running" and (s.step or 0) >= 2)
    where = cluster.run("squeue", "--noheader", f"--jobs={seen.task}", "--format=%D")
    assert where == "2"
    cluster.run("scancel", "--signal=USR1", seen.task)
    saved = wait_for(cluster, run, "gpt", lambda s: s.state == "waiting")
    assert saved.why == "to continue" and saved.step >= 2 and saved.share < 1
    kept = run / "cells" / saved.name / "checkpoints" / "latest"
    assert int(kept.read_text().strip().removeprefix("step-")) == saved.step
    # a node refuses a job that starts within the second in which it was told to end it
    cluster.run("scontrol", "update", f"JobId={seen.task}", "StartTime=now+3")
    wait_for(cluster, run, "report", lambda s: s.state == "done")

    assert {state.state for state in status(run)} == {"done"}
    results = json.loads((run / "results.json").read_text())
    assert [found["name"] for found in results["cells"]] == ["gpt", "t5", "adapted"]
    assert results["warnings"] == [] and (run / "report.html").exists()
    log = (run / "jobs" / f"cells-0-tp2-{seen.task}.log").read_text()
    assert f"stopped by SIGUSR1 and saved at step {saved.step}" in log
    assert "back to the queue" in log

    # exactly the unbroken run of the same layout
    Pool().run(2, run_cells, study, run.with_name("unbroken"), ["gpt"])
    pairs = [
        (json.loads(a), json.loads(b))
        for a, b in zip(
            *[
                (folder / "cells" / saved.name / "metrics.jsonl").read_text().splitlines()
                for folder in (run, run.with_name("unbroken"))
            ],
            strict=True,
        )
    ]
    assert len(pairs) > saved.step
    for a, b in pairs:
        assert (a["loss"], a["gradient_norm"]) == (b["loss"], b["gradient_norm"]), a["step"]


def test_a_failing_cell_stops_the_chain_and_says_why(cluster, make, capsys):
    written, submit, run = make
    study = written(
        [cell("gpt", "gpt"), {**cell("adapted", "prefix_lm", budget=6e8), "from": "gpt"}]
    )
    with lock.alone(expand(study, run)[0].locked, "cell"):
        assert submit() == 0
        wait_for(cluster, run, "report", lambda s: s.state == "not run")
    gpt, adapted, prepare, report = status(run)
    assert gpt.state == "failed" and "another process" in gpt.why
    assert adapted.state == "not run" and prepare.state == "done" and report.state == "not run"
    assert cluster.run("squeue", "--noheader") == ""
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "another process" in shown and "a job before it failed" in shown
    assert not (run / "results.json").exists()


@pytest.fixture
def train(cluster, launch, raw, tmp_path, monkeypatch):
    """train(OPTIONS) submits a run over two nodes that ends never: its job, metrics and log, once
    it has made a step."""
    mine = json.loads(json.dumps(raw))
    mine["training"] |= {"steps": 1_000_000, "micro_batch_size": 2}
    mine["parallel"] = {"tensor_parallel": 2}
    mine["logging"]["directory"] = str(tmp_path / "run")
    mine["data"]["workers"] = 0
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(mine))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGAARCH_LAUNCH", str(launch))
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "train.log"

    def submit(*more):
        options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--time=60", *more]
        script = str(launch / "train.sbatch")
        job = cluster.run("sbatch", *options, "--output=train.log", script, "train.yaml")
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 1, log)
        return job, metrics, log

    return submit


def test_a_job_near_its_time_limit_saves_and_goes_back_to_the_queue(cluster, train):
    job, metrics, log = train("--signal=USR1@120")
    ran = seconds(cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%M"))
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={ran // 60 + 2}")
    wait_until(lambda: "back to the queue" in log.read_text(), log)
    wait_until(lambda: cluster.run("squeue", "-h", f"--jobs={job}", "-o%T") == "PENDING", log)
    told = re.search(r"stopped by SIGUSR1 and saved at step (\d+)", log.read_text())
    assert (metrics.parent / "checkpoints" / f"step-{int(told[1]):08d}").is_dir()


def test_a_job_that_is_preempted_with_a_grace_time_saves_and_continues(cluster, train):
    job, metrics, log = train()
    order = ["--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=urgent.log"]
    urgent = cluster.run("sbatch", *order, "--wrap=echo ran")
    wait_until(lambda: "back to the queue" in log.read_text(), log)
    told = re.search(r"stopped by SIGTERM and saved at step (\d+)", log.read_text())
    wait_until(lambda: urgent not in cluster.run("squeue", "-h", "-o%i").splitlines(), log)
    assert Path("urgent.log").read_text() == "ran\n"
    assert cluster.run("squeue", "-h", f"--jobs={job}", "-o%T") == "PENDING"
    before = metrics.read_text()
    assert before.count("\n") == int(told[1])
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    wait_until(lambda: metrics.read_text().count("\n") > int(told[1]), log)
    assert metrics.read_text().startswith(before)  # times and all: no step was made again


def wait_until(happened, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
