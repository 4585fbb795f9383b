"""The pool of worker processes that distributed tests share."""

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Pool:
    """pool.run(world_size, function, *args) -> results in rank order; see pool.py."""
    return Pool()


@pytest.fixture(autouse=True)
def _folder_of_a_test(tmp_path, monkeypatch):
    monkeypatch.setattr(Pool, "folder", tmp_path)
