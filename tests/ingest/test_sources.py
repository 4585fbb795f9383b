"""Which files a folder or a glob gives, and what is said of the others."""

import os

import pytest

from megaarch.ingest import corpus, sources
from tests.ingest.folders import PACKED, messy, write

SPELLED = {
    "json": (".jsonl", ".ndjson", ".jsonlines", ".json"),
    "parquet": (".parquet", ".pq"),
    "text": (".txt", ".text", ".md", ".markdown"),
}


def read(path):
    return list(corpus.documents(str(path)))


def test_directories_and_globs_are_sorted(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.md", "c.jsonl", "skipped.csv"):
        write(tmp_path / name)
    assert read(tmp_path) == ["a.md", "10.txt", "2.txt", "c.jsonl"]
    assert read(tmp_path / "b" / "*.txt") == ["10.txt", "2.txt"]


def test_every_spelling_of_a_format_and_of_a_compression_is_read(tmp_path):
    names = []
    for kind, suffixes in SPELLED.items():
        packed = [""] if kind == "parquet" else PACKED
        names += [f"a{s}{p}" for s in suffixes for p in packed]
        names += [f"B{s}{p}".upper() for s in suffixes for p in packed]
    for name in names:
        write(tmp_path / name)
    assert sorted(read(tmp_path)) == sorted(names)
    for name in names:
        assert read(tmp_path / name) == [name]
    assert sources.notes([str(tmp_path)]) == []


def test_folders_behind_links_are_read_once_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for k in range(10):
        write(root / "here" / f"{k}.txt", f"here {k}")
        write(elsewhere / "deep" / f"{k}.txt", f"there {k}")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to("here")
    (root / "up").symlink_to("..")
    (root / "itself").symlink_to("itself")
    (elsewhere / "deep" / "back").symlink_to(root)
    write(root / "file.txt", "a file")
    (root / "link.txt").symlink_to(elsewhere / "deep" / "3.txt")
    wanted = {f"{where} {k}" for where in ("here", "there") for k in range(10)} | {"a file"}
    found = read(root)
    assert set(found) == wanted
    assert len(found) == len(wanted) + 1, "the file that a link names too"
    for pattern in ("**/*.txt", "**", "*"):
        assert set(read(root / pattern)) == wanted
    (tmp_path / "door").symlink_to(root)
    assert set(read(tmp_path / "door")) == wanted


def test_many_links_to_the_folders_above_do_not_multiply(tmp_path):
    folder = tmp_path
    for level in range(12):
        folder = folder / f"level{level}"
        write(folder / "a.txt", f"text {level}")
        for k in range(4):
            (folder / f"up{k}").symlink_to(tmp_path)
    assert len(read(tmp_path)) == len(read(tmp_path / "**" / "*.txt")) == 12


def test_hidden_files_copies_and_what_is_no_text_are_skipped_and_told(tmp_path):
    kept = messy(tmp_path)
    assert sorted(read(tmp_path)) == sorted(kept)
    (note,) = sources.notes([str(tmp_path), "embedded"])
    assert note.startswith(f"data source {tmp_path}: skipped 8 hidden (.#a.txt, .")
    assert " 2 empty (b.txt, c.jsonl.gz), " in note
    assert "9 copies by an editor or file manager (#a.txt#, a.bak.jsonl, a.jsonl.bak, ...)" in note
    assert "4 written by megaarch (cached, old.heldout.jsonl, old.manifest.json, ...)" in note
    assert "3 of no known format (LICENSE, a.parquet.gz, table.csv)" in note
    assert note.endswith("2 broken links, pipes or devices (gone.txt, pipe.txt)")
    assert "\n" not in note


@pytest.mark.parametrize(
    "name",
    ["a copy.txt", "a (copy).txt", "a (1).txt", "a - Copy.txt", "Copy of a.txt", "a copy 2.txt"],
)
def test_a_copy_by_a_file_manager_is_skipped_where_it_is_as_long_as_its_original(tmp_path, name):
    write(tmp_path / "a.txt", "original")
    write(tmp_path / name, "original")
    assert read(tmp_path) == ["original"]
    write(tmp_path / name, "another text")
    assert sorted(read(tmp_path)) == ["another text", "original"]
    write(tmp_path / name, "original")
    (tmp_path / "a.txt").unlink()
    assert read(tmp_path) == ["original"]


def test_a_folder_of_nothing_but_skipped_files_says_so(tmp_path):
    write(tmp_path / ".a.txt")
    write(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=r"skipped were 1 hidden \(.a.txt\), 1 of no known"):
        read(tmp_path)


def test_a_note_is_one_line_whatever_the_names(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "new\nline\x1b[31m.csv").write_text("x")
    (tmp_path / os.fsdecode(b"\xff.csv")).write_text("x")
    (note,) = sources.notes([str(tmp_path)])
    assert note.endswith(r"2 of no known format (new\nline\x1b[31m.csv, \udcff.csv)")


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    write(tmp_path / ".data" / "a.txt")
    assert read(tmp_path / ".data") == read(tmp_path / ".data" / "*") == ["a.txt"]


def test_a_glob_reads_the_folders_that_it_matches(tmp_path):
    for name in ("2024-01/a.txt", "2024-02/sub/b.txt", "2025-01/c.txt", "2024.txt"):
        write(tmp_path / name)
    write(tmp_path / "2024-02" / "table.csv")
    assert read(tmp_path / "2024*") == ["a.txt", "b.txt", "2024.txt"]
    assert "1 of no known format (table.csv)" in sources.notes([str(tmp_path / "2024*")])[0]


def test_a_name_with_a_globs_letters_is_a_name(tmp_path):
    write(tmp_path / "[a]" / "b[1].txt")
    assert read(tmp_path / "[a]") == read(tmp_path / "[a]" / "b[1].txt") == ["b[1].txt"]
    assert read(tmp_path / "**" / "*.txt") == ["b[1].txt"]


def test_missing_sources(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist: give a file"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="directory without a text file"):
        read(tmp_path)
    with pytest.raises(ValueError, match="is no name of a file"):
        read("a\0b")
    with pytest.raises(ValueError, match="'' is no name of a file"):
        read("")
    (tmp_path / "link.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"link.txt does not exist: .*broken links"):
        read(tmp_path / "link.txt")


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/zero"):
        with pytest.raises(ValueError, match="is a pipe or a device: give a regular file"):
            read(path)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    write(tmp_path / "a.txt")
    write(tmp_path / "closed" / "b.txt")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="closed cannot be read: Permission denied"):
        read(tmp_path)


def test_the_source_changes_its_identity(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = sources.identity(str(file))
    file.write_text("two!")
    assert sources.identity(str(file)) != before
