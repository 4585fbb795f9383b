"""A folder serves one process at a time, and a lost one does not keep it for good."""

import fcntl
import os
import socket
import subprocess
import sys
import threading

import pytest

from megaarch.study import lock

pytestmark = pytest.mark.slow


@pytest.fixture
def held(tmp_path):
    """held(NAME): the folder's lock is held, in the name that stands in the file; its file."""
    files = []

    def hold(name):
        files.append((tmp_path / "lock").open("w"))
        files[-1].write(name)
        files[-1].flush()
        fcntl.flock(files[-1], fcntl.LOCK_EX)
        return files[-1]

    yield hold
    for file in files:
        file.close()


def ended():
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_holder_that_runs_here_is_told_at_once(tmp_path, held, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 600.0)
    held(f"{socket.gethostname()} {os.getpid()}\n")
    refused = pytest.raises(ValueError, match="another process is running this run")
    with refused, lock.alone(tmp_path, "run"):
        raise AssertionError


@pytest.mark.parametrize("holder", ["elsewhere 7", "here and ended"])
def test_a_lock_that_outlives_its_holder_is_waited_for(holder, tmp_path, held, caplog):
    file = held(holder.replace("here and ended", f"{socket.gethostname()} {ended()}"))
    threading.Timer(2 * lock.PATIENCE, file.close).start()
    with lock.alone(tmp_path, "run"):
        assert (tmp_path / "lock").read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert "waiting up to 150 s" in caplog.text


def test_what_fails_before_it_writes_leaves_nothing(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with pytest.raises(ValueError, match="a mistake"), lock.alone(folder, "run"):
        raise ValueError("a mistake")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a mistake"), lock.alone(folder, "run"):
        (folder / "metrics.jsonl").touch()
        raise ValueError("a mistake")
    assert (folder / "lock").exists()
