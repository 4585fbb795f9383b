"""What a conversion leaves where it fails: nothing of its own, and all of others'."""

import errno

import pytest

from megaarch.interchange import files
from tests.tools.conversions import convert

WRITERS = {"hf": "write_hf", "safetensors": "write_safetensors", "checkpoint": "write_checkpoint"}


def below(folder):
    """Every name below a folder, a file with its content."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("to", WRITERS)
def test_what_another_process_has_finished_meanwhile_stays(to, run, place, monkeypatch, capsys):
    """The same command, started a moment later, is done first."""
    folder, _ = run()
    arguments = (folder, place / "out", "--to", to, "--no-verify")
    write, found = getattr(files, WRITERS[to]), []

    def overtaken(path, *given):
        if not found:
            found.append(None)
            assert convert(*arguments) == 0
            found.append(below(place / "out") or (place / "out").read_bytes())
        return write(path, *given)

    monkeypatch.setattr(files, WRITERS[to], overtaken)
    assert convert(*arguments) == 2
    assert f"{place / 'out'} exists: give another output" in capsys.readouterr().err
    assert found[1] == (below(place / "out") or (place / "out").read_bytes())
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("to", WRITERS)
def test_a_users_own_files_beside_the_output_stay(to, run, place, capsys):
    folder, _ = run()
    (place / "out.writing").mkdir()
    (place / "out.writing" / "notes.txt").write_text("mine")
    assert convert(folder, place / "out", "--to", to, "--no-verify") == 0
    assert (place / "out.writing" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in place.iterdir()) == ["out", "out.writing"]
    (place / "link").symlink_to("nowhere")
    assert convert(folder, place / "link", "--to", to, "--no-verify") == 2
    assert f"{place / 'link'} exists" in capsys.readouterr().err
    assert (place / "link").is_symlink()


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(to, run, place, monkeypatch, capsys):
    folder, _ = run()

    def full(weights, file, metadata):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_save", full)
    assert convert(folder, place / "out", "--to", to) == 2
    error = capsys.readouterr().err
    assert f"{place / 'out'} could not be written: No space left on device: free space" in error
    assert error.count("\n") == 1 and not list(place.iterdir())


def test_a_sentence_names_the_output_and_not_where_it_was_checked(run, place, monkeypatch, capsys):
    folder, _ = run()
    write = files.write_hf

    def spoiled(path, config, *rest):
        write(path, config | {"use_cache": "sometimes"}, *rest)

    monkeypatch.setattr(files, "write_hf", spoiled)
    assert convert(folder, place / "out", "--to", "hf", "--verify") == 2
    assert f"convert.py: {place / 'out'}: transformers" in capsys.readouterr().err
    assert not list(place.iterdir())
