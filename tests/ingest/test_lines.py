"""Lines of any length, plain and compressed, whole or cut into shards."""

import bz2
import gzip
import io
import json
import lzma

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megaarch.ingest import corpus, lines
from megaarch.ingest.lines import Shard
from megaarch.ingest.shards import cut


class Counted(bytes):
    """Bytes that count what is copied out of them and joined to them."""

    copied = 0

    def split(self, *arguments):
        pieces = super().split(*arguments)
        Counted.copied += sum(map(len, pieces))
        return [Counted(piece) for piece in pieces]

    def __add__(self, other):
        Counted.copied += len(self) + len(other)
        return Counted(super().__add__(other))

    __radd__ = __add__


@given(st.lists(st.binary(max_size=6).map(lambda raw: raw.replace(b"\x00", b"\n")), max_size=12))
def test_lines_are_those_of_all_blocks_together(blocks):
    assert list(lines.split_lines(iter(blocks))) == b"".join(blocks).split(b"\n")


@pytest.mark.parametrize("newlines", [0, 1, 3])
def test_a_line_of_many_blocks_is_copied_once(newlines, monkeypatch):
    for count in (100, 800):
        blocks = [Counted(b"x" * 100) for _ in range(count)]
        for k in range(newlines):
            blocks[(k + 1) * count // 4] = Counted(b"x" * 50 + b"\n" + b"x" * 49)
        monkeypatch.setattr(Counted, "copied", 0)
        found = list(lines.split_lines(iter(blocks)))
        assert len(found) == newlines + 1
        assert b"\n".join(found) == b"".join(blocks)
        assert Counted.copied <= 2 * 100 * count


class Watched(io.BytesIO):
    """A file that counts the bytes that are read of it."""

    def __init__(self, content):
        super().__init__(content)
        self.taken = 0

    def read(self, *size):
        found = super().read(*size)
        self.taken += len(found)
        return found

    def readline(self, *size):
        found = super().readline(*size)
        self.taken += len(found)
        return found


@pytest.mark.parametrize("shards", [10, 80])
def test_shards_of_a_long_line_read_the_file_about_once(shards):
    content = b"short\n" + b"x" * 7000 + b"\nlast"
    file, step = Watched(content), len(content) // shards + 1
    found = []
    for start in range(0, len(content), step):
        file.seek(0)
        found += [*lines._range_blocks(file, start, min(start + step, len(content)))]
    assert b"".join(found) == content
    assert file.taken < 3 * len(content)


def packed(content):
    compress = zstandard.ZstdCompressor().compress
    halves = content[:50], content[50:]  # two parts, as concatenated files have
    return {
        "a.jsonl": content,
        "a.jsonl.gz": b"".join(map(gzip.compress, halves)),
        "a.jsonl.bz2": b"".join(map(bz2.compress, halves)),
        "a.jsonl.xz": b"".join(map(lzma.compress, halves)),
        "a.jsonl.zst": b"".join(map(compress, halves)),
    }


TEXTS = ["First document.\nTwo lines.", "Zweites, mit Umlaut: größer.", "第三", "long " * 500]
CONTENT = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize("name", packed(b""))
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_records_longer_than_a_block_of_every_compression(name, block, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", block)
    monkeypatch.setattr(lines, "FRAME_BLOCK", block)
    (tmp_path / name).write_bytes(packed(CONTENT)[name])
    assert list(corpus.documents(str(tmp_path / name))) == TEXTS
    shards = list(cut(str(tmp_path / name), 256))
    found = [text for shard in shards for (text,) in corpus.read(shard)]
    assert found == TEXTS
    assert len(shards) == (len(CONTENT) // 256 + 1 if name == "a.jsonl" else 1)


@pytest.mark.parametrize("name", [name for name in packed(b"") if name != "a.jsonl"])
@pytest.mark.parametrize("fault", ["cut", "cut short", "plain", "noise behind", "second"])
def test_a_damaged_compressed_file_is_one_sentence(name, fault, tmp_path):
    sound = packed(CONTENT)[name]
    content = {
        "cut": sound[:-3],
        "cut short": sound[: len(sound) // 2],
        "plain": CONTENT,
        "noise behind": sound + b"noise" * 20,
        "second": sound + b"-" + packed(CONTENT)[name][1:],
    }[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        list(corpus.documents(str(tmp_path / name)))


@pytest.mark.parametrize("name", [name for name in packed(b"") if name != "a.jsonl"])
def test_padding_behind_and_between_parts_is_no_damage(name, tmp_path):
    part = packed(CONTENT)[name]
    (tmp_path / name).write_bytes(part + bytes(512) + part + bytes(1024))
    assert list(corpus.documents(str(tmp_path / name))) == TEXTS + TEXTS


def test_many_small_frames_are_read_in_time_linear_in_them(tmp_path, monkeypatch):
    compress = zstandard.ZstdCompressor().compress
    frames = [compress(f"{k}\n".encode()) for k in range(3000)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    honest, given = zstandard.ZstdDecompressor, []

    class Watching:
        def decompressobj(self):
            frame = honest().decompressobj()
            self.decompress = lambda block: given.append(len(block)) or frame.decompress(block)
            self.frame = frame
            return self

        def __getattr__(self, name):
            return getattr(self.frame, name)

    monkeypatch.setitem(lines.DECOMPRESSORS, "zstandard", lambda: Watching().decompressobj())
    (text,) = corpus.documents(str(tmp_path / "a.txt.zst"))
    assert text == "".join(f"{k}\n" for k in range(3000))
    assert sum(given) <= len(frames) * lines.FRAME_BLOCK


def test_a_shard_of_a_file_keeps_its_lines_whole(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(CONTENT)
    begins = [0, *(at + 1 for at, byte in enumerate(CONTENT) if byte == ord("\n"))]
    for start in range(0, len(CONTENT), 11):
        for end in (start + 1, start + 11, start + 300, len(CONTENT)):
            wanted = [text for text, at in zip(TEXTS, begins) if start <= at < end]
            found = [text for (text,) in corpus.read(Shard(file, start, end))]
            assert found == wanted


@pytest.mark.parametrize("mark", [b"\n<|endoftext|>\n", b"\f"])
def test_a_document_with_a_line_that_is_not_utf8_is_left_out_whole(mark, tmp_path):
    """Without the line it would be another text."""
    parts = [b"one\ntwo", b"three\nfour \xff\nfive", b"six", b"se\xffven", b"eight\nnine"]
    (tmp_path / "a.txt").write_bytes(mark.join(parts))
    faults = []
    found = [
        text.strip() for (text,) in corpus.read(Shard(tmp_path / "a.txt"), on_error=faults.append)
    ]
    assert found == ["one\ntwo", "six", "eight\nnine"]
    assert [str(fault) for fault in faults] == [
        f"{tmp_path / 'a.txt'}, line {line}: not UTF-8 (invalid start byte)"
        for line in ((5, 10) if mark[0] == 10 else (3, 4))
    ]
