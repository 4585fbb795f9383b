"""PREFIX.parts: what stands there and is not the job's stays."""

import errno
import json

import pytest

from megaarch.ingest import preprocess
from tests.tools.preprocessing import OUTPUTS, command, document
from tests.tools.run import tool


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_output(prefix):
    return not any(prefix.with_name(prefix.name + suffix).exists() for suffix in OUTPUTS)


@pytest.fixture
def parts(tmp_path):
    """A user's own folder, under the name that --output x gives the job's."""
    folder = tmp_path / "x.parts"
    folder.mkdir()
    for number in range(3):
        rows = [json.dumps({"text": document(seed)}) for seed in range(number, 90, 3)]
        (folder / f"{number:08d}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("given", ["x.parts/*.jsonl", "x.parts", "link"])
def test_sources_in_the_folder_of_parts_are_refused(given, parts, tokenizer, tmp_path, capsys):
    (tmp_path / "link").symlink_to(parts)
    before = contents(parts)
    assert tool("preprocess")(command(tmp_path / given, tokenizer, tmp_path / "x")) == 2
    error = capsys.readouterr().err
    assert f"{parts / '00000000.jsonl'} lies in" in error and "give another --output" in error
    assert contents(parts) == before and no_output(tmp_path / "x")


@pytest.mark.parametrize("names", [["00000000.bin"], ["notes.txt", "lock"], ["train.idx"]])
def test_a_folder_of_parts_with_files_but_no_plan_is_refused(
    names, source, tokenizer, tmp_path, capsys
):
    parts = tmp_path / "x.parts"
    parts.mkdir()
    for name in names:
        (parts / name).write_text("mine")
    assert tool("preprocess")(command(source, tokenizer, tmp_path / "x")) == 2
    error = capsys.readouterr().err
    assert f"{parts} holds {names[0]}, and no plan.json" in error and error.count("\n") == 1
    assert contents(parts) == dict.fromkeys(names, b"mine") and no_output(tmp_path / "x")


def test_files_that_are_put_beside_the_shards_stay(source, tokenizer, tmp_path, monkeypatch):
    arguments, parts = command(source, tokenizer, tmp_path / "x"), tmp_path / "x.parts"
    finish = preprocess._finish

    def meddled(*given):
        (parts / "notes.txt").write_text("mine")
        (parts / "deep").mkdir()
        return finish(*given)

    monkeypatch.setattr(preprocess, "_finish", meddled)
    assert tool("preprocess")(arguments) == 0
    assert sorted(path.name for path in parts.iterdir()) == ["deep", "notes.txt"]
    assert tool("preprocess")(arguments) == 0, "it is finished"
    assert (parts / "notes.txt").read_text() == "mine"
    (parts / "plan.json").write_text("{}")  # of another job
    (parts / "00000000.bin").write_text("mine")
    assert tool("preprocess")(arguments) == 0
    assert (parts / "00000000.bin").read_text() == "mine"


def test_a_job_that_was_killed_while_it_cleared_its_parts_is_finished(
    source, tokenizer, tmp_path, monkeypatch
):
    arguments, parts = command(source, tokenizer, tmp_path / "x"), tmp_path / "x.parts"
    clear = preprocess._clear

    def killed(folder):
        for path in sorted(folder.glob("0*"))[:3]:
            path.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "_clear", killed)
    assert tool("preprocess")(arguments) == 130
    assert parts.exists()
    monkeypatch.setattr(preprocess, "_clear", clear)
    assert tool("preprocess")(arguments) == 0
    assert not parts.exists()


def test_a_full_disk_is_one_sentence(source, tokenizer, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preprocess.shards, "make", full)
    assert tool("preprocess")(command(source, tokenizer, tmp_path / "x")) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'x'}.parts could not be written: No space left on device: free" in error
    assert error.count("\n") == 1
