"""Being told to stop: the step is finished, the run saved, and it continues as if unbroken."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml

from megaarch.checkpoint import checkpoint
from megaarch.data.loader import prefetch
from megaarch.training.memory_check import out_of_memory
from megaarch.training.preemption import REQUEUE, Stopped, Watch
from megaarch.training.trainer import Trainer

pytestmark = pytest.mark.slow

BOUND = 120.0  # seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(number, tiny, prepared, tmp_path):
    whole = Trainer(tiny(logging__directory=str(tmp_path / "whole")), prepared)
    whole.run()
    before = signal.getsignal(number)
    stopped = Trainer(tiny(), prepared)
    stopped.watch = lambda step: step.progress.step == 3 and os.kill(os.getpid(), number)
    with pytest.raises(Stopped, match="saved at step 3"):
        stopped.run()
    assert signal.getsignal(number) is before
    again = Trainer(tiny(), prepared)
    assert again.progress.step == 3
    again.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_signal_ahead_of_the_first_step_is_answered_after_it(tiny, prepared):
    """A run that is told to stop each time it starts moves on each time."""
    own = os.getpid()
    stopped = Trainer(
        tiny(), prepared, hold_out=lambda *_: os.kill(own, signal.SIGUSR1), shares=(0.0,)
    )
    with pytest.raises(Stopped, match="saved at step 1"):
        stopped.run()


class Killed(Exception):
    pass


@pytest.fixture
def lethal():
    """SIGUSR1 ends what runs, as it does by default, but not the tests with it."""

    def kill(*_):
        raise Killed

    before = signal.signal(signal.SIGUSR1, kill)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("moment", ["last step", "last save"])
def test_a_signal_by_the_end_of_the_last_save_lets_it_finish(
    moment, async_save, lethal, tiny, prepared, tmp_path
):
    settings = tiny(training__save_every=0, training__async_save=async_save)

    def signalled(folder):
        given = settings.logging.model_copy(update={"directory": str(tmp_path / folder)})
        trainer = Trainer(settings.model_copy(update={"logging": given}), prepared)
        if moment == "last step":
            trainer.watch = lambda step: step.progress.step == 6 and lethal()
        else:
            honest = trainer.saver.save
            trainer.saver.save = lambda *given: (lethal(), honest(*given))
        return trainer

    assert signalled("complete").run().step == 6
    assert checkpoint.newest(tmp_path / "complete").name == "step-00000006"
    with pytest.raises(Stopped, match="SIGUSR1 and saved at step 6"):
        signalled("followed").run(more=True)
    again = signalled("followed")
    assert again.progress.step == 6
    assert again.run(more=True).step == 6
    with pytest.raises(Killed):
        lethal()


@contextmanager
def started(settings, folder):
    """`megaarch train` in a process group of its own, once it has done three steps."""
    config, errors = folder / "run.yaml", folder / "stderr"
    raw = settings.model_dump(mode="json", exclude_none=True, exclude={"study"})
    config.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "megaarch", "train", str(config)]
    metrics = Path(settings.logging.directory) / "metrics.jsonl"
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + BOUND
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.02)
        yield process, errors
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lives(process):
    """Whether a process is there, and no mere entry that nobody has waited for."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers_of(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


ENDLESS = {"training__steps": 100_000, "training__warmup": 0.0, "data__workers": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_with_workers_saves_it(number, tiny, prepared, tmp_path):
    with started(tiny(**ENDLESS), tmp_path) as (process, errors):
        workers = workers_of(process)
        assert workers
        os.killpg(process.pid, number)
        assert process.wait(BOUND) == REQUEUE, errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert not any(map(lives, workers))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    again = Trainer(tiny(**ENDLESS), prepared)
    assert again.progress.step == lines >= 3
    assert checkpoint.newest(tmp_path / "run").name == f"step-{lines:08d}"


class Hanging:
    """Steps of which the second is never made."""

    device_type = "cpu"

    def __getitem__(self, step):
        while step:
            time.sleep(1)
        return os.getpid()


def test_a_worker_that_hangs_ends_with_the_block():
    with prefetch(Hanging(), 0, 1) as steps:
        worker = str(next(steps))
        assert lives(worker)
    assert not lives(worker)


class Bytes:
    """Steps of so many bytes; more than a pipe holds, and a worker waits in the middle of one."""

    device_type = "cpu"

    def __init__(self, size):
        self.size = size

    def __getitem__(self, step):
        return bytes(self.size)


@pytest.mark.parametrize("size", [1, 1 << 18])
def test_a_workers_death_is_an_error_of_the_next_step_alone(size):
    with prefetch(Bytes(size), 0, 1) as steps:
        assert next(steps) == bytes(size)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        # its threads and all, and not by a join: torch's handler asks children that nobody has waited for
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
            next(steps)


def test_a_workers_death_is_an_error_of_the_step_that_waits():
    with prefetch(Hanging(), 0, 1) as steps:
        worker = next(steps)
        threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
        with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
            next(steps)


def test_workers_do_not_outlive_a_run_that_was_killed(tiny, tmp_path):
    with started(tiny(**ENDLESS | {"data__workers": 2}), tmp_path) as (process, _):
        workers = workers_of(process)
        assert len(workers) == 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + BOUND
        while any(map(lives, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_worker_that_the_system_kills_is_one_sentence(tiny, tmp_path):
    with started(tiny(**ENDLESS), tmp_path) as (process, errors):
        (worker,) = workers_of(process)
        os.kill(int(worker), signal.SIGKILL)
        assert process.wait(BOUND) == 2, errors.read_text()
    said = errors.read_text()
    assert "Traceback" not in said and "lower data.workers" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_again_lets_the_run_save(number):
    """A launcher passes on what its ranks have got as well."""
    with Watch() as signals:
        for _ in range(3):
            os.kill(os.getpid(), number)
    assert signals.asked == number


def test_a_second_ctrl_c_ends_at_once():
    # what starts tests in the background may have them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Watch() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.asked == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_model_that_does_not_fit_is_one_sentence_and_other_errors_are_not():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert "(1,048,576.0 GiB more were asked for): lower" in out_of_memory(caught.value)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    assert "(2.5 GiB more were asked for)" in out_of_memory(cuda)
    assert out_of_memory(MemoryError()).startswith("out of memory: lower")
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
