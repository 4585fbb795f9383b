"""Bad files, from a fixed seed: no traceback, no hang, nothing written. A longer run:
`python -m tests.fuzz.run --inputs 2000`."""

import pytest

from tests.fuzz import sound
from tests.fuzz.readers import BOUND, READERS, tried


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sound.make(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", READERS)
def test_a_bad_file_is_told_in_a_sentence(name, files, tmp_path):
    READERS[name].read(files)
    told = 0
    for seed in range(30):
        outcome, seconds = tried(READERS[name], files, tmp_path / "case", seed)
        assert outcome in ("accepted", "told"), f"seed {seed}: {outcome}"
        assert seconds < BOUND, f"seed {seed}: {seconds:.0f} s"
        told += outcome == "told"
    assert told or name in (
        "metrics.jsonl",
        "manifest.json",
    )  # which leave out, and say, what is bad
