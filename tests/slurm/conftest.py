"""The cluster that the tests of this folder share: a real SLURM of four nodes on this machine."""

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    if reason := missing():
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(started, monkeypatch):
    """The cluster; SLURM's commands, and its jobs this package, find it under these variables."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)  # of a job that these tests may run in
    for name, value in started.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield started
    started.clear()


@pytest.fixture(scope="session")
def launch(started, tmp_path_factory) -> Path:
    """A copy of launch/ with the site.sh of the cluster: one process a node."""
    folder = tmp_path_factory.mktemp("launch")
    for file in (ROOT / "launch").iterdir():
        if file.name != "site.sh":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "site.sh").write_bytes((started.folder / "site.sh").read_bytes())
    return folder
