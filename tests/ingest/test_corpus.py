import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megaarch.errors import UserError
from megaarch.ingest import corpus, embedded_corpus, lines

TEXTS = ["First document.\nTwo lines.", "Zweites, mit Umlaut: größer.", "第三"]


def json_lines(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def pack(name, content):
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):
        half = len(content) // 2  # two frames, as concatenated files have
        compress = zstandard.ZstdCompressor().compress
        return compress(content[:half]) + compress(content[half:])
    return content


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path, name):
    (tmp_path / name).write_bytes(
        pack(name, json_lines(TEXTS) + b"\n" + json_lines(["   ", "last"]))
    )
    assert list(corpus.documents(str(tmp_path / name))) == [*TEXTS, "last"]


def test_a_record_longer_than_a_read_block(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", 7)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(pack(name, json_lines(TEXTS)))
        assert list(corpus.documents(str(tmp_path / name))) == TEXTS


def test_parquet_in_another_field(tmp_path):
    table = pyarrow.table({"body": TEXTS, "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(corpus.documents(str(tmp_path / "a.parquet"), "body")) == TEXTS
    with pytest.raises(ValueError, match=r"a.parquet: no field 'text' \(there are: body, n\)"):
        list(corpus.documents(str(tmp_path / "a.parquet")))
    raw = pyarrow.array([b"fine", b"also fine", b"\xff\xfe"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())  # unchecked
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet, row 3: not UTF-8"):
        list(corpus.documents(str(tmp_path / "c.parquet")))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match=r"b.parquet cannot be read as parquet"):
        list(corpus.documents(str(tmp_path / "b.parquet")))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.zst"])
def test_plain_text_is_one_document_unless_divided(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(pack(name, b"\xef\xbb\xbfone\n\n\n\nstill one\r\n"))
    assert list(corpus.documents(str(file))) == ["one\n\n\n\nstill one\r\n"]
    file.write_bytes(pack(name, b"one\n<|endoftext|>\ntwo\n\x0cthree\x0c\n<|endoftext|>\nfour"))
    assert list(corpus.documents(str(file))) == ["one\n", "two\n", "three", "four"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", json_lines(TEXTS) + b'{"text": \n', r"a.jsonl, line 4: malformed JSON"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl, line 1: one JSON object a line is expected"),
        ("a.jsonl", b'\n{"body": "x"}\n', r"line 2: no field 'text' \(there are: body\); set data"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' is not a string but int"),
        ("a.jsonl", b'{"text": "\\ud83d x \xc3\xa4"}', r"line 1: field 'text' holds half a surr"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"a.jsonl, line 2: not UTF-8"),
        ("a.txt", b"fine\nfine\n\xc3\x28", r"a.txt, line 3: not UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress(json_lines(TEXTS), mtime=0)[:-9],
            r"a.jsonl.gz cannot be read",
        ),
        ("a.jsonl.gz", b"plain", r"a.jsonl.gz cannot be read"),
        ("a.txt.zst", zstandard.compress(b"x" * 999)[:-4], r"a.txt.zst cannot be read"),
        ("a.txt.zst", b"plain", r"a.txt.zst cannot be read"),
        ("a.csv", b"x", r"a.csv is of no known format: known are .jsonl"),
    ],
)
def test_malformed_input_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(corpus.documents(str(tmp_path / name)))


def test_supervised_pairs_and_kinds(tmp_path):
    file, text = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    records = [{"input": "2+2", "target": "4", "task": "sum"}, {"input": "", "target": "x"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    text.write_bytes(json_lines(TEXTS))
    assert list(corpus.read(lines.Shard(file), corpus.PAIR)) == [("2+2", "4"), ("", "x")]
    assert corpus.kind(str(file)) == "supervised"
    assert corpus.kind(str(file), text_field="input") == "text"
    assert corpus.kind(str(text)) == corpus.kind("embedded") == "text"
    assert corpus.kind(str(text), "body") == "text"
    assert corpus.kind(str(text), "body", prefer_pairs=True) == "supervised"
    with pytest.raises(ValueError, match="line 1: no field 'input'"):
        list(corpus.read(lines.Shard(text), corpus.PAIR))


def test_embedded_corpus():
    texts = [text for _, text in embedded_corpus.documents()]
    assert sum(map(len, texts)) > 2_000_000
    assert len(texts) > 400
    assert texts == list(corpus.documents("embedded"))
    assert any("An identifier occurring as an atom is a name." in text for text in texts)
    [difflib] = [text for text in texts if text.startswith("Module difflib -- helpers")]
    assert "Return list of triples describing matching subsequences." in difflib  # a method's
    assert "import" not in difflib[:20]
    assert not any(text.startswith("Python Character Mapping Codec") for text in texts)
