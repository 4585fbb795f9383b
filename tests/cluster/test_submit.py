"""The chain of a study: arrays by layout, dependencies by generation, throttles, one sentence for
what does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megaarch.cli import main
from megaarch.cluster import slurm_commands, status, submit
from megaarch.cluster.slurm_commands import Site
from megaarch.cluster.submit import Request, plan
from megaarch.config import ConfigError, set_path
from tests.study.example_results import example_cell


@pytest.fixture
def site(site_folder):
    return Site.read(site_folder)


def by_name(jobs):
    return {job.name: job for job in jobs}


def finish(directory, key):
    folder = directory / "cells" / key
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps({"signature": {}, "result": example_cell("gpt")}))


def test_a_sweep_of_some_sizes_has_no_trials_of_the_others_which_wait_for_it(study, site, tmp_path):
    study["study"] |= {
        "seeds": [0],
        "sizes": [{"name": "small", "layers": 2}, {"name": "large", "layers": 4}],
        "cells": study["study"]["cells"][:2],
        "tune": {"learning_rates": [1e-3, 2e-3], "sizes": ["small"]},
    }
    jobs = by_name(plan(study, tmp_path, site, Request(4, "60")))
    trials = {name: job for name, job in jobs.items() if name.startswith("trials")}
    assert [len(job.tasks) for job in trials.values()] == [2, 2]
    assert not any("large" in task for job in trials.values() for task in job.tasks.values())
    large = jobs["cells-0-single"]
    assert "gpt/large-6e+08-seed0" in large.tasks.values() and set(trials) <= set(large.needs)
    for name in ("gpt", "t5"):
        finish(tmp_path, f"{name}/small-6e+08-seed0")
    again = by_name(plan(study, tmp_path, site, Request(4, "60")))
    assert {n: j.tasks for n, j in again.items() if n in trials} == {
        n: j.tasks for n, j in trials.items()
    }, "its law wants them, whatever has been finished"


def test_cells_of_a_layout_are_an_array_and_children_follow_their_parents(study, site, tmp_path):
    jobs = by_name(plan(study, tmp_path, site, Request(4, "60")))
    assert list(jobs) == [
        "prepare",
        "cells-0-single",
        "cells-0-pp2",
        "cells-0-fsdp2-tp2",
        "cells-1-single",
        "report",
    ]
    # task i is cell i of the grid: all cells of the first seed, then those of the second
    assert jobs["cells-0-single"].tasks == {0: "gpt/base-6e+08-seed0", 4: "gpt/base-6e+08-seed1"}
    assert list(jobs["cells-0-pp2"].tasks) == [1, 5]
    shapes = {name: (job.nodes, job.ranks) for name, job in jobs.items()}
    assert shapes["cells-0-single"] == (1, 1) and shapes["cells-0-pp2"] == (1, 2)
    assert shapes["cells-0-fsdp2-tp2"] == (2, 2)
    assert jobs["cells-0-pp2"].needs == ("prepare",)
    assert jobs["cells-1-single"].needs == ("prepare", "cells-0-single")
    assert set(jobs["report"].needs) == {name for name in jobs if name.startswith("cells")}


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_never_more_nodes_than_given_are_in_use(nodes, study, site, tmp_path):
    jobs = [job for job in plan(study, tmp_path, site, Request(nodes, "60")) if job.tasks]
    after: dict[str, set[str]] = {}  # everything that has ended before a job begins
    for job in jobs:
        direct = {name for name in (*job.needs, *job.behind) if name != "prepare"}
        after[job.name] = direct.union(*(after[name] for name in direct))
    for job in jobs:
        beside = [
            other
            for other in jobs
            if other.name not in after[job.name] and job.name not in after[other.name]
        ]
        assert sum(other.nodes * other.at_once for other in beside) <= nodes
        assert 1 <= job.at_once <= len(job.tasks)


def test_trials_come_before_the_cells_of_their_generation(study, site, tmp_path):
    study["study"]["tune"] = {"learning_rates": [1e-4, 1e-3]}
    jobs = by_name(plan(study, tmp_path, site, Request(4, "60")))
    # of the first seed alone, in the order of rates.trials: cell by cell, rate by rate
    assert jobs["trials-0-single"].tasks == {
        0: "gpt/base-6e+08-seed0 0.0001",
        1: "gpt/base-6e+08-seed0 0.001",
    }
    assert list(jobs["trials-1-single"].tasks) == [6, 7]
    assert "trials-0-single" in jobs["cells-0-single"].needs
    assert jobs["trials-1-single"].needs == ("prepare", "cells-0-single")
    assert "trials-1-single" in jobs["cells-1-single"].needs


def test_what_is_finished_is_not_submitted_again(study, site, tmp_path):
    finish(tmp_path, "gpt/base-6e+08-seed0")
    jobs = by_name(plan(study, tmp_path, site, Request(4, "60")))
    assert list(jobs["cells-0-single"].tasks) == [4]
    finish(tmp_path, "gpt/base-6e+08-seed1")
    jobs = by_name(plan(study, tmp_path, site, Request(4, "60")))
    assert "cells-0-single" not in jobs and jobs["cells-1-single"].needs == ("prepare",)
    for name in ("t5", "glm", "adapted"):
        for seed in (0, 1):
            finish(tmp_path, f"{name}/base-6e+08-seed{seed}")
    assert [job.name for job in plan(study, tmp_path, site, Request(4, "60"))] == ["report"]


def test_the_dry_run_is_a_script_of_sbatch_commands(study, site_folder, tmp_path, capsys):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(study))
    arguments = [str(path), "--output", str(out), "--launch", str(site_folder)]
    options = ["--nodes", "3", "--time", "1-00", "--sbatch=--qos=long", "--dry-run"]
    assert main(["submit", *arguments, *options]) == 0
    script = capsys.readouterr().out
    assert not out.exists()
    # a shell runs it: sbatch here prints what it is given, and a number
    program = tmp_path / "bin"
    program.mkdir()
    (program / "sbatch").write_text('#!/bin/sh\necho "$*" >&2\necho $$\n')
    (program / "sbatch").chmod(0o755)
    path = {"PATH": f"{program}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-euc", script], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prepare, single, _pp2, fsdp, child, _report = done.stderr.splitlines()
    assert "--partition=cpu" in prepare and "--gpus" not in prepare and "--array" not in prepare
    assert "--gpus-per-node=1" in single and "--array=0,4%2" in single and "--qos=long" in single
    assert "--nodes=2 --ntasks-per-node=2" in fsdp and "--cpus-per-task=8" in fsdp
    assert "afterok:" in child and "--kill-on-invalid-dep=yes" in child


def test_jobs_without_gpus_take_no_setting_of_the_nodes_that_train(
    study, site_folder, tmp_path, monkeypatch
):
    file = site_folder / "site.sh"
    text = file.read_text().replace("#export SBATCH_QOS", "export SBATCH_QOS")
    text = text.replace("#export SBATCH_CONSTRAINT", "export SBATCH_CONSTRAINT")
    text += "export SBATCH_GPUS_PER_NODE=8 SBATCH_RESERVATION=maintenance SBATCH_MEM_PER_GPU=64G\n"
    text = text.replace("CPU_SBATCH_OPTIONS=()", "CPU_SBATCH_OPTIONS=(--qos=cpu '--comment=a b')")
    file.write_text(text.replace("WARNING_SECONDS=300", "WARNING_SECONDS=900"))
    program = tmp_path / "bin"
    program.mkdir()
    names = ("$SBATCH_PARTITION", "$SBATCH_QOS", "$SBATCH_CONSTRAINT")
    names += ("$SBATCH_GPUS_PER_NODE", "$SBATCH_RESERVATION", "$SBATCH_MEM_PER_GPU")
    (program / "sbatch").write_text(
        f'#!/bin/sh\necho "{" ".join(names)} |" "$@" >>"$LOG"\nwc -l <"$LOG"\n'
    )
    (program / "sbatch").chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PATH", f"{program}:/usr/bin:/bin")
    asked = Request(4, "2:00:00", ("--nice",), prepare_time="8:00:00")
    submit.submit(study, tmp_path / "out", Site.read(site_folder), asked)
    prepare, *cells, report = (tmp_path / "log").read_text().splitlines()
    for line, time in ((prepare, "8:00:00"), (report, "2:00:00")):
        assert line.startswith("gpu      |") and f"--time={time} " in line
        assert "--partition=cpu --qos=cpu --comment=a b " in line and "--nice" not in line
        assert "--signal" not in line
    for line in cells:
        assert line.startswith("gpu normal h100 8 maintenance 64G |") and "--time=2:00:00 " in line
        assert "--signal=USR1@900 --nice " in line and "--partition" not in line
    # on a cluster of one partition there are no others to ask for
    file.write_text(file.read_text().replace("CPU_PARTITION=cpu", "CPU_PARTITION="))
    script = submit.script(study, tmp_path / "other", Site.read(site_folder), asked)
    assert "env" not in script and "--partition" not in script and "--qos=cpu" not in script


def test_the_study_of_the_page_is_a_chain_of_whole_nodes(site_folder, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    block = page.partition("As `study.yaml`:\n\n")[2].partition("\n<!-- -->")[0]
    site = Site(site_folder, gpus_per_node=8, ranks_per_node=8, cpus_per_rank=8, cpu_partition="")
    jobs = by_name(plan(yaml.safe_load(block), tmp_path, site, Request(4, "12:00:00")))
    chain = ["prepare", "cells-0-fsdp16", "cells-0-pp2-fsdp8", "cells-1-fsdp16", "report"]
    assert list(jobs) == chain
    assert len(jobs["cells-0-fsdp16"].tasks) == 7 and jobs["cells-0-fsdp16"].nodes == 2


def test_submitting_prints_and_keeps_the_ids_and_one_study_runs_once(
    study, site_folder, tmp_path, monkeypatch, capsys
):
    program = tmp_path / "bin"
    program.mkdir()
    (program / "sbatch").write_text(
        '#!/bin/sh\necho "$SBATCH_ACCOUNT $*" >>"$LOG"\nwc -l <"$LOG"\n'
    )
    (program / "squeue").write_text('#!/bin/sh\necho "2_4|PENDING|Resources"\n')
    for file in program.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PATH", f"{program}:/usr/bin:/bin")
    path, out = tmp_path / "study.yaml", tmp_path / "my out"
    path.write_text(yaml.safe_dump(study))
    arguments = ["submit", str(path), "--output", str(out), "--launch", str(site_folder)]
    arguments += ["--nodes", "8", "--time", "60"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert [job.id for job in submit.read(out)] == [1, 2, 3, 4, 5, 6]
    assert "2  cells-0-single  2 x 1 nodes" in shown and f"megaarch status '{out}'" in shown
    commands = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith("my-project ") for line in commands)
    assert "--dependency=afterok:1,afterok:2" in commands[4]
    assert yaml.safe_load((out / "study.yaml").read_text()) == study
    assert main(arguments) == 2
    assert "jobs 2 of this study are still queued" in capsys.readouterr().err
    (program / "squeue").write_text(
        "#!/bin/sh\necho 'Unable to contact the controller' >&2\nexit 1\n"
    )
    assert main(arguments) == 2
    assert "squeue does not say whether jobs 1 2 3 4 5 6" in capsys.readouterr().err
    assert (tmp_path / "log").read_text().splitlines() == commands


@pytest.mark.parametrize(
    "change, asked, sentence",
    [
        ({}, Request(1, "60"), r"--nodes 1: cell glm/base-6e\+08-seed0 needs 2 nodes"),
        ({}, Request(0, "60"), "--nodes 0: give at least 1"),
        ({}, Request(4, "soon"), "--time soon: give it as hours:minutes:seconds"),
        ({}, Request(4, "5"), "--time 5: a job is told to save 300 s before its limit"),
        ({}, Request(4, "60", prepare_time="long"), "--prepare-time long: give it as hours"),
        ({"parallel.tensor_parallel": 3}, Request(4, "60"), "heads do not divide"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change, asked, sentence, study, site, tmp_path):
    study["study"]["seeds"] = [0]
    for path, value in change.items():
        set_path(study, path, value)
    with pytest.raises(ValueError, match=sentence):
        plan(study, tmp_path / "out", site, asked)
    assert not (tmp_path / "out").exists()


def test_a_layout_that_leaves_nodes_half_full_is_refused(study, site, tmp_path):
    study["study"]["cells"][2]["set"] = {"parallel.data_parallel_shard": 3}
    study["training"] |= {"micro_batch_size": 2, "global_batch_size": 12}
    with pytest.raises(ConfigError, match="3 processes, which do not fill nodes of 2"):
        plan(study, tmp_path, site, Request(4, "60"))


# as man sbatch says of --output and --export, with a script that runs at once
SBATCH = """\
#!{python}
import os, re, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
script = sys.argv[len(options) + 1 :]
given = dict(option[2:].partition("=")[::2] for option in options)
with open(os.environ["COUNTER"], "a+") as file:
    file.write("x")
    file.seek(0)
    number = str(len(file.read()))
every, *more = given["export"].split(",")
assert every == "ALL"
variables = os.environ | dict(word.split("=", 1) for word in more) | {{"SLURM_JOB_ID": number}}
tasks = given["array"].split("%")[0].replace("-", ",").split(",") if "array" in given else [None]
for task in tasks:
    if task is not None:
        variables |= {{"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task}}
    filled = {{"%%": "%", "%j": number, "%A": number, "%a": task}}
    log = given["output"]
    if "\\\\" not in log:
        log = re.sub("%.", lambda found: filled[found[0]], log)
    with open(log, "a") as out:
        subprocess.run(["bash", *script], env=variables, stdout=out, stderr=out)
print(number)
"""
NAMES = [
    "50%jobs",
    "%%j",
    "100%",
    "a,b",
    "a b",
    "k=v",
    'it\'s "so"',
    "Ünï-日本",
    "two\nlines",
    "@x@$y",
]


@pytest.mark.parametrize("name", [*NAMES, " ".join(NAMES)])
def test_folders_of_any_name_reach_the_jobs_and_their_logs_the_status(
    name, study, site_folder, tmp_path, monkeypatch
):
    launch, programs = tmp_path / "in" / name, tmp_path / "bin"
    out = tmp_path / "out" / name.replace("\n", " ")  # the settings take no control characters
    launch.parent.mkdir()
    site_folder.rename(launch)
    for file in ("job.sh", "study.sbatch"):
        (launch / file).write_text((slurm_commands.SCRIPTS / file).read_text())
    with (launch / "site.sh").open("a") as site:
        site.write("CONTAINER=(refuse)\n")
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (programs / "refuse").write_text('#!/bin/sh\necho "megaarch: no room for $7"\nexit 2\n')
    (programs / "srun").write_text('#!/bin/sh\necho "megaarch: $*"\nexit 2\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("COUNTER", str(tmp_path / "jobs"))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    study["study"]["seeds"] = [0]
    submit.submit(study, out, Site.read(launch), Request(4, "60"))
    states = {state.name: state for state in status.status(out)}
    assert (states["prepare"].state, states["prepare"].why) == ("failed", f"no room for {out}")
    cell = states["t5/base-6e+08-seed0"]
    assert (
        cell.state == "failed" and f"compare {out}/study.yaml --output {out} --cell 1" in cell.why
    )


def test_the_dry_run_of_folders_of_any_name_is_what_is_submitted(
    study, site_folder, tmp_path, monkeypatch
):
    """A shell that runs the printed script gives sbatch the same words."""
    out, programs = tmp_path / " ".join(NAMES).replace("\n", ""), tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(
        '#!/bin/sh\nprintf "%s\\0" "$@" >>"$LOG"\necho x >>"$LOG.n"\nwc -l <"$LOG.n"\n'
    )
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    site, asked = Site.read(site_folder), Request(4, "60", ("--comment=a b, 'c'",))
    monkeypatch.setenv("LOG", str(tmp_path / "printed"))
    subprocess.run(["bash", "-euc", submit.script(study, out, site, asked)], check=True)
    monkeypatch.setenv("LOG", str(tmp_path / "submitted"))
    submit.submit(study, out, site, asked)
    assert (tmp_path / "printed").read_bytes() == (tmp_path / "submitted").read_bytes()


def test_a_folder_whose_logs_sbatch_cannot_name_is_one_sentence(study, site, tmp_path):
    with pytest.raises(ValueError, match="has a backslash: give another folder"):
        plan(study, tmp_path / "a\\b", site, Request(4, "60"))


def test_a_study_that_is_submitted_within_a_job_takes_nothing_of_it(
    study, site_folder, tmp_path, monkeypatch
):
    """sbatch passes its variables on, and the srun of the new job takes them for options."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\nenv >>{log}\necho 1\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    outer = {"JOB_ID": "3", "NTASKS_PER_NODE": "2", "MEM_PER_CPU": "1", "DISTRIBUTION": "cyclic"}
    for name, value in outer.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")  # says where SLURM is
    submit.submit(study, tmp_path / "out", Site.read(site_folder), Request(4, "60"))
    found = [line for line in log.read_text().splitlines() if line.startswith("SLURM_")]
    assert set(found) == {"SLURM_CONF=/etc/other.conf"} and len(found) == 6


def test_without_slurm_it_says_where_to_go(study, site_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    monkeypatch.setattr(Site, "read", lambda folder: Site(folder, 2, 2, 1, ""))
    order = ["--nodes", "4", "--time", "60", "--output", str(tmp_path / "out")]
    assert main(["submit", str(path), *order]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
