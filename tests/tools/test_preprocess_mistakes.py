"""Preprocessing of malformed records, and what a person does wrong: one sentence each."""

import json
import sys

import pytest

from megaarch.ingest.indexed_dataset import IndexedDataset
from tests.tools.preprocessing import OUTPUTS, command, document
from tests.tools.run import tool


@pytest.fixture
def broken(tmp_path):
    """Twelve documents, and lines 4, 8 and 11 that are none; parts end within lines."""
    lines = [json.dumps({"text": document(seed)}).encode() for seed in range(12)]
    lines[3:3], lines[7:7], lines[10:10] = [b'{"text": "cut'], [b"\xff\xfe"], [b'{"text": 5}']
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


FAULTS = ((4, "malformed JSON"), (8, "not UTF-8"), (11, "is not a string but int"))


@pytest.mark.parametrize("size", [400, 2500, 10**6])
def test_malformed_records_are_skipped_counted_and_named(size, broken, tokenizer, tmp_path, capsys):
    more = ["--shard-bytes", str(size), "--skip-malformed", "--held-out", "0"]
    assert tool("preprocess")([*command(broken, tokenizer, tmp_path / "x"), *more]) == 0
    out = capsys.readouterr().out
    assert "3 malformed records" in out
    for line, what in FAULTS:
        assert any(f"broken.jsonl, line {line}: " in s and what in s for s in out.splitlines())
    assert len(IndexedDataset(tmp_path / "x")) == 12


@pytest.mark.parametrize("between", [[], [{"text": "sound"}]])
def test_lines_of_a_source_that_is_given_twice(between, broken, tokenizer, tmp_path):
    """Its second time begins at its first line again, whatever stands between."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(record) + "\n" for record in between))
    more = ["--input", *map(str, (broken, *([other] if between else []), broken))]
    more += ["--shard-bytes", "400", "--skip-malformed", "--held-out", "0"]
    assert tool("preprocess")([*command(broken, tokenizer, tmp_path / "x"), *more]) == 0
    named = json.loads((tmp_path / "x.manifest.json").read_text())["malformed_records"]
    assert [int(record.split("line ")[1].split(":")[0]) for record in named] == [4, 8, 11] * 2


@pytest.mark.parametrize(("size", "workers"), [(400, 1), (400, 2), (10**6, 1)])
def test_a_malformed_record_ends_the_job_by_default(
    size, workers, broken, tokenizer, tmp_path, capsys
):
    arguments = command(broken, tokenizer, tmp_path / "x", "--shard-bytes", str(size))
    assert tool("preprocess")([*arguments, "--workers", str(workers)]) == 2
    error = capsys.readouterr().err
    assert "broken.jsonl, line " in error and "Traceback" not in error
    if workers == 1:
        assert "broken.jsonl, line 4: malformed JSON" in error
    assert not any((tmp_path / f"x{suffix}").exists() for suffix in OUTPUTS)
    assert tool("preprocess")([*arguments, "--skip-malformed"]) == 0, "it continues"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--input", "/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["--tokenizer", "/nowhere.model"], "/nowhere.model does not exist"),
        (["--workers", "0"], "--workers must be from 1 to 1024, not 0"),
        (["--workers", "1000000"], "--workers must be from 1 to 1024"),
        (["--output", "/dev/null"], "/dev/null is a pipe or a device"),
        (["--shard-bytes", "1"], "--shard-bytes must be at least 256"),
        *(
            (["--output", name], f"--output {name!r} names no files")
            for name in ("a/", "a/.bin", "..")
        ),
        (["--held-out", "1"], "--held-out is 0, or a share from"),
        (["--held-out", "1e-9"], "--held-out is 0, or a share from"),
        (["--held-out", "nan"], "--held-out is 0, or a share from"),
        (["--text-field", "body"], "no field 'body'"),
        (["--output", "/proc/x"], "/proc/x.parts"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    given, said, source, tokenizer, tmp_path, capsys
):
    assert tool("preprocess")([*command(source, tokenizer, tmp_path / "x"), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert error.count("preprocess.py:") == 1
    assert not any((tmp_path / f"x{suffix}").exists() for suffix in OUTPUTS)


def test_sources_that_are_no_plain_text_are_refused(made, tokenizer, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"input": "a", "target": "b"}\n')
    assert tool("preprocess")(command(pairs, tokenizer, tmp_path / "x")) == 2
    assert "pairs.jsonl is supervised, not text" in capsys.readouterr().err
    assert tool("preprocess")(command(f"{made}.bin", tokenizer, tmp_path / "x")) == 2
    assert "x.bin is indexed, not text" in capsys.readouterr().err
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert tool("preprocess")(command(empty, tokenizer, tmp_path / "x")) == 2
    assert "hold no text" in capsys.readouterr().err


def test_torchrun_and_a_missing_mpi4py_are_told(source, tokenizer, tmp_path, capsys, monkeypatch):
    arguments = command(source, tokenizer, tmp_path / "x")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert tool("preprocess")(arguments) == 2
    assert "pip install 'megaarch[mpi]'" in capsys.readouterr().err
    assert tool("preprocess")([*arguments, "--workers", "4"]) == 2
    assert "leave it out" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tool("preprocess")(arguments) == 2
    assert "use mpiexec or srun" in capsys.readouterr().err
