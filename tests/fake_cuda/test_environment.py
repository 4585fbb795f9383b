"""These tests run in an environment of their own, which has fewer plugins of pytest than `make test`'s."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_they_are_collected_without_xdist():
    """As `make fake-cuda` collects them: it installs no xdist, and unknown markers are errors."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--collect-only", str(FOLDER)]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
