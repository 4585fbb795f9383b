"""A rank that dies, stops, hangs or fails ends its job in bounded time, and is named."""

import os
import signal
import socket
import time

import pytest

from megaarch.checkpoint import checkpoint
from megaarch.config.schema import Training
from megaarch.distributed.heartbeat import LOST, Beat, Heartbeat
from megaarch.distributed.mesh import Grid
from megaarch.training.preemption import REQUEUE
from megaarch.training.trainer import Trainer
from tests.distributed.jobs import Job

TP2 = {"parallel__tensor_parallel": 2}
PP2 = {"parallel__pipeline_parallel": 2}
BOUND = 120.0  # seconds; without the heartbeat the other ranks wait for ten minutes
SHORT = {"training__heartbeat_timeout": 6.0, "training__steps": 5000, "training__warmup": 0.0}


@pytest.mark.parametrize(
    "layout, number, rank",
    [
        (TP2, signal.SIGKILL, 1),
        (PP2, signal.SIGKILL, 0),
        (PP2, signal.SIGSTOP, 1),
        (TP2, signal.SIGSTOP, 0),
    ],
)
def test_a_rank_that_dies_or_stops_is_named(layout, number, rank, tiny, prepared, tmp_path):
    with Job(tiny("gpt", training__micro_batch_size=2, **SHORT, **layout), tmp_path) as job:
        job.reach(3)
        job.kill(rank, number)
        assert job.wait(BOUND, [1 - rank]) == [LOST], job.told
        sentences = [line for line in job.told.splitlines() if line.startswith("megaarch: ")]
        assert len(sentences) == 1, job.told
        assert f"rank {rank} on {socket.gethostname()} (last step " in sentences[0]
        assert "no sign of life" in sentences[0] and "Traceback" not in job.told
        assert int(sentences[0].partition("last step ")[2].partition(")")[0]) >= 2


def stumble(how):
    """Rank 1 hangs, fails, or is slow for once, in its fourth step."""
    honest = Trainer.train_step

    def launch(self, *given):
        if self.progress.step == 3 and os.environ["RANK"] == "1":
            if how == "hang":
                time.sleep(1000)
            if how == "fail":
                raise ArithmeticError("made up")
        honest(self, *given)

    def slow_evaluation(self):
        if how == "slow" and self.progress.step == 2 and os.environ["RANK"] == "1":
            time.sleep(5)

    Trainer.train_step = launch
    Trainer._evaluate = slow_evaluation


def test_a_rank_that_hangs_in_a_step_is_named_with_its_place(tiny, prepared, tmp_path):
    given = SHORT | TP2 | {"training__hang_timeout": 3.0}
    with Job(tiny("gpt", **given), tmp_path, stumble, "hang") as job:
        assert job.wait(BOUND) == [LOST, LOST], job.told
        assert "step 4 has not ended for" in job.told and "Traceback" not in job.told
        assert f"rank 1 on {socket.gethostname()} (last step 3) is in launch (test_heart" in (
            job.told
        )


def test_the_error_of_one_rank_is_told_by_the_others(tiny, prepared, tmp_path):
    with Job(tiny("gpt", **SHORT, **TP2), tmp_path, stumble, "fail") as job:
        assert job.wait(BOUND) == [LOST, 1], job.told
        assert "(last step 3) failed and the others wait: ArithmeticError: made up" in job.told
        assert job.told.count("Traceback") == 1  # the rank's own


def test_what_takes_long_outside_of_steps_ends_nothing(tiny, prepared, tmp_path):
    given = {"training__heartbeat_timeout": 10.0, "training__hang_timeout": 2.0}
    with Job(tiny("gpt", **given, **TP2), tmp_path, stumble, "slow") as job:
        assert job.wait(BOUND) == [0, 0], job.told
        assert job.step() == 6


def test_a_rank_that_came_late_to_a_step_leaves_it_its_time():
    """Rank 1 was outside of steps for 900 s, and has been in step 11 for no longer than it takes."""

    def said(*times, hang_timeout=600.0):
        heartbeat = Heartbeat(Grid.single("cpu"), Training(hang_timeout=hang_timeout))
        heartbeat.beats = {
            rank: Beat(9, "host", last, held, longest, "step", "runs", "")
            for rank, (last, held, longest) in enumerate(times)
        }
        return heartbeat._hung()

    assert said((10, 900.0, 2.0), (10, 0.0, 2.0)) == ""
    assert said((10, 902.0, 2.0), (10, 2.0, 2.0)) == ""
    assert said((10, 900.0, 2.0), (11, 0.0, 2.0), (11, 0.0, 2.0)).startswith(
        "step 11 has not ended for 900 s"
    )
    assert "for 601 s" in said((10, 1501.0, 2.0), (10, 601.0, 2.0))
    # the wait is no step's length: rank 1 tells it
    assert "for 604 s" in said((20, 604.0, 904.0), (20, 606.0, 4.0))
    assert said((20, 604.0, 904.0), (20, 606.0, 204.0)) == ""
    assert said((10, 902.0, 2.0), (10, 902.0, 2.0), hang_timeout=0.0) == ""


def test_a_signal_to_one_rank_ends_all_saved(tiny, prepared, tmp_path):
    with Job(tiny("gpt", training__async_save=True, **SHORT, **PP2), tmp_path) as job:
        job.reach(3)
        job.kill(1, signal.SIGTERM)
        assert job.wait(BOUND) == [REQUEUE, REQUEUE], job.told
        assert f"stopped by SIGTERM and saved at step {job.step()}" in job.told
    assert checkpoint.newest(tmp_path / "run").name == f"step-{job.step():08d}"


def test_a_mistake_of_the_user_is_told_at_once_by_one_rank(tiny, prepared, tmp_path):
    settings = tiny("gpt", training__start_from=str(tmp_path / "nowhere"), **TP2)
    with Job(settings, tmp_path) as job:
        assert job.wait(BOUND) == [2, 2], job.told
        assert len(job.told.splitlines()) == 1 and "no complete checkpoint" in job.told


def test_the_first_step_compiles_and_bounds_no_other():
    """Three times the longest step is allowed, but not three times the compiler."""
    heartbeat = Heartbeat(Grid.single("cpu"), Training(hang_timeout=300.0))
    for number, seconds in ((1, 300.0), (2, 2.0)):
        with heartbeat.step(number):
            heartbeat.turns += round(seconds / heartbeat.interval)
    assert heartbeat.longest == pytest.approx(2.0, abs=heartbeat.interval)
