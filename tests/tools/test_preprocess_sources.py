"""Odd corpora: preprocess.py and megaarch train make the same of them, and say the same."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from megaarch.config.schema import Data
from megaarch.ingest import preprocess, split
from megaarch.ingest.indexed_dataset import IndexedDataset
from megaarch.ingest.pipeline import Pipeline
from megaarch.ingest.prepare import prepare
from megaarch.ingest.tokenizer import Tokenizer, train_sentencepiece
from tests.conftest import made_up_text
from tests.ingest.folders import messy, write
from tests.tools.run import tool


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_sentencepiece([made_up_text(seed, 20) for seed in range(9)], 400, 10, path)
    return str(path)


@pytest.fixture
def both(tokenizer, tmp_path, capsys, caplog):
    """Makes both of a source; returns what was prepared of the text and of the tokens, after a look
    at what they have in common."""

    def make(source, *more, **settings):
        capsys.readouterr()
        prefix = tmp_path / "out" / "x"
        given = ["--input", str(source), "--tokenizer", tokenizer, "--output", str(prefix)]
        assert tool("preprocess")([*given, *more]) == 0
        told = capsys.readouterr().err
        data = Data(
            source=str(source),
            tokenizer=tokenizer,
            sentinels=10,
            cache=str(tmp_path / "cache"),
            **settings,
        )
        with caplog.at_level(logging.WARNING, "megaarch"):
            text = prepare(data, 400)
        assert [f"preprocess.py: {line}" for line in caplog.messages] == [
            line for line in told.splitlines() if line.startswith("preprocess.py: ")
        ]
        tokens = prepare(data.model_copy(update={"source": f"{prefix}.bin"}), 400)
        ((ours, _),) = text.train
        for suffix in (".bin", ".idx"):
            assert Path(ours.path + suffix).read_bytes() == Path(f"{prefix}{suffix}").read_bytes()
        assert tokens.heldout == text.heldout
        assert tokens.manifest.notes == text.manifest.notes
        assert tokens.manifest.heldout_share == text.manifest.heldout_share
        return text, caplog.messages

    return make


def test_a_folder_as_people_have_them(both, tmp_path):
    root = tmp_path / "corpus"
    kept = messy(root)
    for k, name in enumerate(kept):
        write(root / name, made_up_text(k, 30))
    for k in range(40):
        write(tmp_path / "elsewhere" / f"{k}.ndjson.xz", made_up_text(100 + k, 5))
        write(root / "sub" / f"{k}.txt.bz2", made_up_text(200 + k, 5))
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked" / "loop").symlink_to(root)
    text, told = both(root)
    assert text.manifest.documents == len(kept) + 80
    assert told[0].startswith(f"data source {root}: skipped 8 hidden (")
    assert all("must not be read" not in line for line in text.heldout)


def huge(below, seed=0):
    """A text of half of the corpus, below the threshold or above it."""
    while True:
        text = "\n\n".join(made_up_text(1000 + seed * 500 + k, 20) for k in range(100))
        if (split.place(split.digest(text)) < 0.1) == below:
            return text
        seed += 1


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_document_of_half_of_the_corpus(below, first, both, tmp_path):
    large, small = huge(below), [made_up_text(seed, 10) for seed in range(200)]
    texts = [large, *small] if first else [*small, large]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert 0.4 < len(large) / sum(map(len, texts)) < 0.6
    text, told = both(source, "--shard-bytes", "9000")
    assert 0.1 <= text.manifest.heldout_share <= 0.2
    assert large not in text.heldout
    assert bool(told) == below
    if below:
        share = f"{text.manifest.heldout_share:.2%} of the text is held out"
        assert "documents of more than 5.00% of the text each (1 here) stay in train" in told[0]
        assert share in told[0]


def test_few_documents_are_told_and_nearly_one_is_refused(both, tokenizer, tmp_path, capsys):
    source = tmp_path / "text.jsonl"
    texts = [made_up_text(seed, 40) for seed in range(3)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text, told = both(source, "--held-out", "0.05", held_out=0.05)
    assert 0.2 < text.manifest.heldout_share < 0.5
    assert "% of the text is held out, where 5.00% was asked for" in told[0]
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["short", huge(True)]))
    given = ["--input", str(source), "--tokenizer", tokenizer, "--output", str(tmp_path / "y")]
    assert tool("preprocess")(given) == 2
    assert "too few documents (2) to hold out 10.00%" in capsys.readouterr().err
    data = Data(source=str(source), tokenizer=tokenizer, sentinels=10, cache=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"too few documents \(2\) to hold out 10.00%"):
        prepare(data, 400)


def test_a_document_that_is_train_is_whole(both, tokenizer, tmp_path):
    """It is first in its shard, below the threshold, and so known to be held out for a while."""
    large, source = huge(True), tmp_path / "text.jsonl"
    small = [made_up_text(seed, 10) for seed in range(200)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*small, large]))
    text, _ = both(source, "--shard-bytes", "3000")
    reader = Tokenizer(tokenizer)
    ((train, _),) = text.train
    found = [train[k] for k in range(len(train))]
    assert reader.decode(max(found, key=len)) == large
    assert all(ids[-1] == reader.vocabulary.eos for ids in found)
    assert np.array_equal(np.sort(train.lengths), np.sort(IndexedDataset(train.path).lengths))


def test_names_that_are_no_utf8_are_names(both, tokenizer, tmp_path):
    root = tmp_path / "corpus"
    write(root / "a.jsonl", "\n\n".join(made_up_text(seed, 5) for seed in range(2)))
    for k in range(40):
        path = root / os.fsdecode(b"sub\xff") / os.fsdecode(b"%d\xfe.jsonl" % k)
        write(path, made_up_text(10 + k, 5))
    with (root / os.fsdecode(b"bad\xfd.jsonl")).open("wb") as file:
        file.write(b'{"\\ud800": "a field that is half a surrogate pair"}\n')
    write(root / os.fsdecode(b"b\xfe.csv"))
    prefix = tmp_path / "x"
    given = ["--input", str(root), "--tokenizer", tokenizer, "--output", str(prefix)]
    assert tool("preprocess")([*given, "--skip-malformed"]) == 0
    assert tool("preprocess")([*given, "--skip-malformed"]) == 0, "its manifest is the same"
    (root / os.fsdecode(b"bad\xfd.jsonl")).unlink()
    text, _ = both(root)
    assert text.manifest.documents == 41


def test_output_and_cache_in_the_folder_of_the_text_are_not_read(tokenizer, tmp_path):
    for k in range(60):
        write(tmp_path / f"{k}.txt", made_up_text(k, 10))
    given = ["--input", str(tmp_path), "--tokenizer", tokenizer, "--output", str(tmp_path / "x")]
    cache = str(tmp_path / "cache")
    data = Data(source=str(tmp_path), tokenizer=tokenizer, sentinels=10, cache=cache)
    first = None
    for _ in range(2):
        assert tool("preprocess")(given) == 0
        prepared = prepare(data, 400)
        first = first or prepared
        assert (prepared.manifest.documents, prepared.heldout) == (60, first.heldout)
        assert prepared.manifest.key == first.manifest.key
    assert len(IndexedDataset(tmp_path / "x")) == first.manifest.train_documents


DAMAGE = {
    "list": lambda manifest: [],
    "null notes": lambda manifest: manifest | {"notes": None},
    "counts": lambda manifest: manifest | {"documents": "many"},
    "no counts": lambda manifest: {k: v for k, v in manifest.items() if k != "train_bytes"},
    "no bytes": lambda manifest: manifest | {"train_bytes": 0},
    "request": lambda manifest: manifest | {"request": ["tokenizer"]},
    "checksum": lambda manifest: manifest | {"checksum": None},
}


@pytest.fixture
def made(tokenizer, tmp_path, capsys):
    """The arguments, the prefix and the settings of a dataset that preprocess.py made."""
    source, prefix = tmp_path / "text.jsonl", tmp_path / "x"
    texts = [made_up_text(seed, 10) for seed in range(60)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ["--input", str(source), "--tokenizer", tokenizer, "--output", str(prefix)]
    assert tool("preprocess")(given) == 0
    cache = str(tmp_path / "cache")
    data = Data(source=f"{prefix}.bin", tokenizer=tokenizer, sentinels=10, cache=cache)
    capsys.readouterr()
    return given, prefix, data


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_manifest_is_one_sentence(damage, made, capsys):
    given, prefix, data = made
    file = Path(f"{prefix}.manifest.json")
    file.write_text(json.dumps(DAMAGE[damage](json.loads(file.read_text()))))
    with pytest.raises(
        ValueError, match=r"x.manifest.json is damaged: .*preprocess the text again"
    ):
        prepare(data, 400)
    assert tool("preprocess")(given) == 2
    assert "x.manifest.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [0, -1, 1])
def test_held_out_documents_that_are_gone_or_more_are_told(lines, made):
    _, prefix, data = made
    file = Path(f"{prefix}.heldout.jsonl")
    held_out = file.read_text().splitlines(keepends=True)
    file.write_text("".join(held_out[:lines] if lines <= 0 else [*held_out, *held_out[:1]]))
    if not lines:
        file.unlink()
    with pytest.raises(ValueError, match=r"x.heldout.jsonl holds \d+ documents, and \d+ were held"):
        prepare(data, 400)


NO_RECORDS = {"list": "[]", "null": "null", "other": '{"sources": 3}', "deep": "[" * 100_000}


@pytest.mark.parametrize("what", NO_RECORDS)
@pytest.mark.parametrize("name", ["plan.json", "00000000.json"])
def test_damaged_parts_are_made_again_or_refused(what, name, made, tmp_path, capsys, monkeypatch):
    given, prefix, _ = made
    given = [*given[:-1], str(tmp_path / "y")]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "_finish", interrupted)
    assert tool("preprocess")(given) == 130
    monkeypatch.undo()
    (tmp_path / "y.parts" / name).write_text(NO_RECORDS[what])
    assert tool("preprocess")(given) == (2 if name == "plan.json" else 0)
    if name == "plan.json":
        assert "holds part of a job with another" in capsys.readouterr().err
    else:
        assert Path(f"{tmp_path / 'y'}.bin").read_bytes() == Path(f"{prefix}.bin").read_bytes()


def test_a_dataset_of_an_older_version_is_read(made):
    """Whose manifest has neither notes nor the digest of all tokens."""
    _, prefix, data = made
    file = Path(f"{prefix}.manifest.json")
    older = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("notes", "digest")}
    file.write_text(json.dumps(older))
    prepared = prepare(data, 400)
    assert prepared.manifest.notes == []
    assert len(prepared.heldout) == older["heldout_documents"] > 0


@pytest.mark.parametrize("by", ["preprocess", "train"])
def test_a_source_that_changes_while_it_is_read_is_told(
    by, tokenizer, tmp_path, capsys, monkeypatch
):
    """What was train by its place in the old file would be held out by its place in the new one."""
    file, write_held_out = tmp_path / "a.jsonl", Pipeline.write_held_out
    rows = [json.dumps({"text": made_up_text(seed, 5)}) + "\n" for seed in range(200)]
    file.write_text("".join(rows))

    def replaced(pipeline, path):
        file.write_text("".join(reversed(rows)))
        return write_held_out(pipeline, path)

    monkeypatch.setattr(Pipeline, "write_held_out", replaced)
    said = f"data source {file} has changed while it was read"
    if by == "train":
        cache = tmp_path / "cache"
        with pytest.raises(ValueError, match=said):
            prepare(
                Data(source=str(file), tokenizer=tokenizer, sentinels=10, cache=str(cache)), 400
            )
        assert not list(cache.glob("*/manifest.json"))
        return
    given = ["--input", str(file), "--tokenizer", tokenizer, "--output", str(tmp_path / "x")]
    assert tool("preprocess")(given) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "x.parts"]
