"""How a command ends whose output nobody takes: a full disk, or a reader who has gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
# prints little, so that it lies in the buffer until the end
COMMAND = (
    "import sys; from megaarch.cli.errors import run_command; sys.exit(run_command('say', {}))"
)
CALLS = ("lambda: print('x') or 0", "lambda: print('x', flush=True) or 0")


def ends(call, stdout):
    """The exit code and the words of a command with a buffered output."""
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", COMMAND.format(call)]
    done = subprocess.run(command, env=usual, stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("call", CALLS)
def test_a_full_disk_is_one_sentence(call):
    with Path("/dev/full").open("w") as full:
        assert ends(call, full) == (2, "say: No space left on device\n")


@pytest.mark.parametrize("call", CALLS)
def test_a_reader_who_has_gone_is_no_failure(call):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert ends(call, writer) == (0, "")
    finally:
        os.close(writer)
