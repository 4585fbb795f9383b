"""What `megaarch status` says, from a study's folder alone and beside squeue and sacct."""

import json
import os
import shutil
import signal

import pytest
from rich.console import Console

from megaarch.cli import main
from megaarch.cluster import submit
from megaarch.cluster.status import status, table
from megaarch.study import lock, run_study
from megaarch.study.folder import save_config
from megaarch.training.preemption import Stopped
from megaarch.training.trainer import Trainer
from tests.study.example_results import example_cell
from tests.study.small_study import EVALUATION

GPT, T5, GLM, CHILD = (f"{name}/base-6e+08-seed0" for name in ("gpt", "t5", "glm", "adapted"))


@pytest.fixture
def run(study, tmp_path):
    """The folder of a study of one seed that nobody has started."""
    study["study"]["seeds"] = [0]
    save_config(study, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(squeue=TEXT, ...): programs that print it, and no others of SLURM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("shutil.which", lambda name: (folder / name).exists())

    def write(**texts):
        for name, text in texts.items():
            (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            (folder / name).chmod(0o755)

    return write


def keep_jobs(run):
    jobs = [
        submit.SlurmJob("prepare", "prepare", id=1),
        submit.SlurmJob("cells-0-single", "cell", tasks={0: GPT}, id=2),
        submit.SlurmJob("cells-0-pp2", "cell", tasks={1: T5, 2: GLM}, id=3),
        submit.SlurmJob(
            "cells-1-single", "cell", tasks={3: CHILD}, needs=("cells-0-single",), id=4
        ),
        submit.SlurmJob("report", "report", id=5),
    ]
    submit.write(run, jobs)
    assert submit.read(run) == jobs
    (run / "jobs").mkdir()


def train_a_little(run, key, steps=4, **more):
    folder = run / "cells" / key
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps({"signature": {}, **more}))
    line = {"loss": 6.5, "tokens_per_second": 1.0}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            spent = {"flops": 6e7 * step, "seen_tokens": 500 * step, "seconds": 2.0 * step}
            file.write(json.dumps({"step": step, **line, **spent}) + "\n")
        file.write('{"step": 99, "los')  # being written


def by_name(states):
    return {state.name: state for state in states}


def test_without_slurm_the_folder_says_what_is_done_running_and_stopped(run, programs):
    train_a_little(run, GPT, result=example_cell("gpt"))
    train_a_little(run, T5)
    with lock.alone(run / "cells" / T5, "cell"):
        states = by_name(status(run))
    assert list(states) == [GPT, T5, GLM, CHILD]
    assert states[GPT].state == "done" and states[GPT].seconds_left is None
    t5 = states[T5]
    assert (t5.state, t5.step, t5.loss) == ("running", 4, 6.5)
    assert t5.share == pytest.approx(0.4) and t5.tokens_per_second == pytest.approx(250)
    assert t5.seconds_left == pytest.approx(12)
    assert states[GLM].state == "not started" and states[GLM].step is None
    assert by_name(status(run))[T5].state == "stopped"


def test_beside_squeue_each_job_has_its_state_and_a_failure_its_sentence(run, programs):
    keep_jobs(run)
    (run / "jobs" / "1_0.code").write_text("0\n")
    (run / "jobs" / "2_0.code").write_text("2\n")
    (run / "jobs" / "cells-0-single-2_0.log").write_text("gpt: building\nmegaarch: no such rate\n")
    (run / "jobs" / "cells-0-pp2-3_1.log").write_text("told to stop\n")
    train_a_little(run, T5)
    programs(squeue="3_1|PENDING|BeginTime\n3_2|RUNNING|None")
    states = by_name(status(run))
    assert states["prepare"].state == "done"
    (run / "jobs" / "1_0.code").write_text("143\n")
    out = (
        "slurmstepd: error: *** JOB 1 ON a CANCELLED AT 2025-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
    )
    (run / "jobs" / "prepare-1_0.log").write_text(out)
    prepare = by_name(status(run))["prepare"]
    assert prepare.state == "failed" and "submit again with a longer one" in prepare.why
    assert (states[GPT].state, states[GPT].why) == ("failed", "no such rate")
    assert (states[T5].state, states[T5].why, states[T5].task) == ("waiting", "to continue", "3_1")
    assert states[GLM].state == "running"
    assert states[CHILD].state == states["report"].state == "not run"
    shown = table(list(states.values()))
    assert "2_0: no such rate" in shown and "waiting (to continue)" in shown
    programs(squeue="3_1|PENDING|Priority\n3_2|COMPLETING|None")
    states = by_name(status(run))
    assert states[GLM].why == "completing"


def test_a_job_that_left_no_word_is_told_from_the_accounts_where_there_are_some(run, programs):
    keep_jobs(run)
    (run / "jobs" / "cells-0-pp2-3_1.log").write_text("t5: building\n")
    train_a_little(run, T5)
    programs(squeue="")
    assert by_name(status(run))[T5].state == "stopped"
    programs(sacct="3_1|OUT_OF_MEMORY\n4_3|CANCELLED by 0")
    states = by_name(status(run))
    assert (states[T5].state, states[T5].why) == ("failed", "out of memory")
    assert (states[CHILD].state, states[CHILD].why) == ("failed", "cancelled")


@pytest.mark.parametrize(
    "account, state",
    [
        *[(name, "waiting") for name in ("PENDING", "REQUEUED", "SPECIAL_EXIT")],
        *[(name, "running") for name in ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING")],
        ("COMPLETED", "done"),
        *[(name, "failed") for name in ("FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED by 0")],
        ("", "stopped"),
    ],
)
def test_where_squeue_does_not_answer_the_accounts_say_how_a_job_is(account, state, run, programs):
    keep_jobs(run)
    (run / "jobs" / "cells-0-pp2-3_1.log").write_text("t5: building\n")
    train_a_little(run, T5)
    programs(sacct=f"1_0|{account}\n3_1|{account}" if account else "")
    states = by_name(status(run))
    assert states["prepare"].state == state
    # a cell whose job completed without its record is not done
    assert states[T5].state == ("stopped" if state == "done" else state)
    # the code that its last start ended with is older than that it runs
    (run / "jobs" / "3_1.code").write_text("69\n")
    found = by_name(status(run))[T5]
    assert found.state == ("failed" if state == "done" else state)
    # and where squeue answers and does not know the job, it has ended, whatever the accounts say
    programs(squeue="")
    assert by_name(status(run))[T5].state == "failed"


@pytest.mark.parametrize(
    "damage",
    [
        *("\0" * 300, "{", "[1]", "null", '{"step": 5}', "[" * 3000),
        *('"step": "5"', '"step": 0', '"step": true', '"step": null'),
        *('"seconds": null', '"seconds": -1', '"seconds": "x"', '"seen_tokens": [1]'),
        *('"tokens_per_second": null', '"loss": {}', '"share": "x"', '"share": 7', '"flops": "x"'),
    ],
)
def test_a_damaged_line_of_metrics_is_left_out(damage, run, tmp_path):
    train_a_little(run, T5)
    path = run / "cells" / T5 / "metrics.jsonl"
    *sound, _ = path.read_text().splitlines()
    if damage.startswith('"'):  # of a line that is sound otherwise
        damage = json.dumps(json.loads(sound[-1]) | {"step": 5} | json.loads(f"{{{damage}}}"))
    for lines in (
        [*sound, damage],
        [damage, *sound],
        [*sound, damage * (10_000_000 // len(damage))],
        [*sound, *[damage] * 99],
    ):
        path.write_text("\n".join(lines) + "\n")
        (alone,) = status(path.parent)
        for state in (by_name(status(run))[T5], alone):
            assert (state.state, state.step, state.loss) == ("stopped", 4, 6.5)
            assert state.tokens_per_second == pytest.approx(250)
        assert table([alone])


def test_how_a_person_likes_squeue_to_answer_leaves_no_job_out(run, programs, monkeypatch):
    keep_jobs(run)
    programs(squeue="3_1|PENDING|Priority")
    script = run.parent / "bin" / "squeue"
    own = '[ -z "$SQUEUE_PARTITION$SACCT_FORMAT" ] || exit 0\n'
    script.write_text(script.read_text().replace("cat", f"{own}cat", 1))
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu")
    monkeypatch.setenv("SACCT_FORMAT", "jobid")
    assert by_name(status(run))[T5].state == "waiting"


def test_a_study_that_compare_runs_has_a_status_and_a_report_of_what_is_finished(
    study, tmp_path, monkeypatch, capsys
):
    study["study"] |= {"seeds": [0], "evaluation": EVALUATION}
    study["study"]["cells"] = [
        {"name": name, "preset": name, "set": {}} for name in ("gpt", "prefix_lm")
    ]
    honest = Trainer.train_step

    def stopped(self, *given):
        if self.settings.model.preset == "prefix_lm" and self.progress.step == 2:
            raise Stopped(15, 2)
        return honest(self, *given)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        run_study.compare(study, run, Console(quiet=True))
    first, second = status(run)
    assert first.state == "done" and first.share == 1
    assert (second.state, second.step) == ("stopped", 2) and 0 < second.share < 1
    assert main(["status", str(run), "--json"]) == 0
    assert [s["state"] for s in json.loads(capsys.readouterr().out)["states"]] == [
        "done",
        "stopped",
    ]
    assert main(["report", str(run)]) == 2
    assert "add --gather" in capsys.readouterr().err
    assert main(["report", str(run), "--gather", "--text"]) == 0
    assert "prefix_lm/base-6e+08-seed0" in capsys.readouterr().out  # among the warnings


def test_a_run_of_train_has_a_status(tiny, prepared, tmp_path, capsys):
    run = tmp_path / "run"
    given = tiny(logging__directory=str(run))
    stopping = Trainer(given, prepared)
    stopping.watch = lambda step: step.progress.step == 3 and os.kill(os.getpid(), signal.SIGUSR1)
    with lock.alone(run, "run"):
        (state,) = status(run)
        assert (state.state, state.step, state.share) == ("running", None, None)
        with pytest.raises(Stopped):
            stopping.run()
        (state,) = status(run)
        assert (state.state, state.step, state.share) == ("running", 3, 0.5)
        spent = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert state.loss == spent[-1]["loss"] and state.tokens_per_second > 0
        assert state.seconds_left == pytest.approx(spent[-1]["seconds"])
    assert status(run)[0].state == "stopped"
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert str(run) in shown and "stopped" in shown and "50%" in shown
    Trainer(given, prepared).run()
    (state,) = status(run)
    assert (state.state, state.step, state.share) == ("done", 6, 1.0)
    assert state.seconds_left is None
    shutil.rmtree(run / "checkpoints" / "step-00000006")  # as where it died before its last save
    assert status(run)[0].state == "stopped"


def test_a_run_on_gpus_shows_its_utilization_and_memory(tiny, prepared, tmp_path):
    Trainer(tiny(training__steps=2), prepared).run()
    assert "MFU" not in table(status(tmp_path / "run"))
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, mfu in zip(lines, (0.40, 0.44), strict=True):
        line |= {"mfu": mfu, "peak_memory": 61.5e9}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (state,) = status(tmp_path / "run")
    assert (state.mfu, state.peak_memory) == (pytest.approx(0.42), 61.5e9)
    head, row = table([state]).splitlines()
    assert head.split()[-2:] == ["MFU", "GB"] and row.split()[-2:] == ["42.0%", "61.5"]


def test_a_folder_that_is_no_study_is_one_sentence(tmp_path, capsys):
    assert main(["status", str(tmp_path / "absent")]) == 2
    assert "is no study's folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--gather"]) == 2
    assert "is no study's folder" in capsys.readouterr().err
