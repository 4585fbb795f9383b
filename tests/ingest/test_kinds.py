"""What a source is read as: text or pairs, by its records and by what the objective takes."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megaarch import config
from megaarch.data.dataset import Rows
from megaarch.ingest import corpus
from megaarch.ingest.prepare import prepare
from megaarch.study.data import text_of
from tests.conftest import made_up_text, tiny_raw

RECORDS = [
    {"input": f"what is {i}?", "target": f"it is {i}.", "text": made_up_text(i, 3), "n": i}
    for i in range(120)
]


def write(path, records):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def settings(tmp_path):
    def make(source, **data):
        raw = tiny_raw(source, tmp_path / "cache")
        raw["data"] |= data
        return config.resolve(raw)

    return make


@pytest.mark.parametrize("name", ["both.jsonl", "both.parquet"])
@pytest.mark.parametrize("field", ["text", "n", "target", "input"])
def test_of_records_that_are_text_and_pairs_the_objective_takes_what_it_needs(
    name, field, tmp_path, settings
):
    source = write(tmp_path / name, RECORDS)
    mine = settings(source, objective="supervised", text_field=field)
    prepared = prepare(mine.data, 512)
    rows = Rows(mine.model, mine.data, prepared, 0)
    assert prepared.supervised
    assert rows.examples + len(prepared.heldout_pairs) == len(RECORDS)
    assert set(prepared.heldout_pairs) < {(r["input"], r["target"]) for r in RECORDS}
    if field != "text":
        return
    text = prepare(settings(source).data, 512)
    assert not text.supervised
    assert set(text.heldout) < {record["text"] for record in RECORDS}


def test_pairs_behind_empty_and_blank_files_are_pairs(tmp_path, settings):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").touch()
    (tmp_path / "corpus" / "b.jsonl").write_text("\n\n")
    pairs = [{"input": r["input"], "target": r["target"]} for r in RECORDS]
    write(tmp_path / "corpus" / "c.jsonl", pairs)
    assert corpus.kind(str(tmp_path / "corpus")) == "supervised"
    mine = settings(tmp_path / "corpus", objective="supervised")
    assert prepare(mine.data, 512).supervised


def test_cells_of_a_study_take_their_own_of_one_source(tmp_path, settings):
    """Whether the study's objective or a cell's is the supervised one."""
    source = write(tmp_path / "both.jsonl", RECORDS)
    text, pairs = settings(source), settings(source, objective="supervised")
    other = write(tmp_path / "other.jsonl", RECORDS[60:])
    for base, own, wanted in (
        (text, pairs, True),
        (pairs, text, False),
        (text, settings(other, objective="supervised"), True),
        (pairs, settings(other), False),
        (pairs, pairs, True),
        (text, text, False),
    ):
        cell = type("Cell", (), {"settings": own})()
        prepared = text_of(cell, base.data)
        assert prepared.supervised == wanted
        assert Rows(own.model, own.data, prepared, 0).per_epoch > 0


def test_pairs_alone_are_shared_by_a_study_whatever_its_own_objective(tmp_path, settings):
    pairs = [{"input": r["input"], "target": r["target"]} for r in RECORDS]
    source = write(tmp_path / "pairs.jsonl", pairs)
    base, own = settings(source), settings(source, objective="supervised")
    cell = type("Cell", (), {"settings": own})()
    assert text_of(cell, base.data).manifest.key == prepare(base.data, 512).manifest.key
