"""A tokenizer by command: one file for every preset, the same from the same documents."""

import json
import random
import re
import tracemalloc

import pytest

from megaarch.cli import main
from megaarch.data.example import SPECIALS
from megaarch.ingest import corpus_sample, split
from megaarch.ingest.corpus_sample import sample
from megaarch.ingest.tokenizer import Tokenizer
from tests.conftest import made_up_text
from tests.tools.run import tool

TEXTS = [made_up_text(seed, 12) + f"\n\nNumber {seed}." for seed in range(60)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "text.jsonl", TEXTS)


def command(source, output, *more):
    given = ["--input", source, "--output", str(output), "--vocabulary-size", "420"]
    return [*given, "--sentinels", "20", *more]


def test_a_file_that_every_preset_trains_with(source, tmp_path, capsys, raw):
    assert tool("tokenizer")(command(source, tmp_path / "new" / "t.model")) == 0
    out = capsys.readouterr().out
    made = Tokenizer(tmp_path / "new" / "t.model", 20, 420)
    for name in SPECIALS:
        assert re.search(rf"^  {name} +{made.vocabulary.special[name]}$", out, re.M)
    assert re.search(r"^  sentinels +419 down to 400$", out, re.M)
    text = "\n A  line,\twith ▁ and ŵ.\n\n"
    assert made.decode(made.encode(text)) == text
    settings = out.rpartition("settings: ")[2].split()
    config = {k: dict(v) for k, v in raw.items()}
    config["logging"]["directory"] = str(tmp_path / "run")
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config))
    given = [*settings, f"data.source={source}", "training.steps=1"]
    for preset in ("t5", "glm", "ul2"):
        own = [f"model.preset={preset}", f"logging.directory={tmp_path / preset}"]
        assert main(["train", str(file), "--set", *given, *own]) == 0


def test_the_same_documents_give_the_same_file(source, tmp_path):
    shuffled = [*TEXTS, *TEXTS[:5]]
    random.Random(3).shuffle(shuffled)
    other = write(tmp_path / "other.jsonl", shuffled)
    for number, (text, size) in enumerate([(source, "25"), (source, "25"), (other, "25")]):
        assert tool("tokenizer")(command(text, tmp_path / str(number), "--sample", size)) == 0
    first = (tmp_path / "0").read_bytes()
    assert first == (tmp_path / "1").read_bytes()
    for text in TEXTS[:10]:  # the order of the lines may break a tie between two merges
        assert Tokenizer(tmp_path / "2").decode(Tokenizer(tmp_path / "2").encode(text)) == text


def test_the_sample_is_by_hash_without_copies_and_without_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_sample, "SPARE", 3)
    shuffled = [*TEXTS, *TEXTS[:30]]
    random.Random(3).shuffle(shuffled)
    sources = [write(tmp_path / "a.jsonl", TEXTS)], [write(tmp_path / "b.jsonl", shuffled)]
    first, second = (sample(source, "text", 25, 0.1) for source in sources)
    assert sorted(first) == sorted(second) and len(first) == 25
    assert first == [text for text in TEXTS if text in first]
    assert all(split.place(split.digest(text)) >= 0.2 for text in first)
    everything = sample(sources[0], "text", 1000)
    assert everything == TEXTS


def test_a_small_sample_of_a_large_corpus_is_all_that_is_kept(tmp_path):
    source = [write(tmp_path / "a.jsonl", (f"{n} " + "word " * 2000 for n in range(3000)))]
    tracemalloc.start()
    try:
        assert len(sample(source, "text", 10)) == 10
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20  # of 30 MB of text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--input", "/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["--vocabulary-size", "200"], "vocabulary too small for the sentinels"),
        (["--sentinels", "-1"], "--sentinels must be from 0 to 1,048,576, not -1"),
        (["--sentinels", "9999999"], "--sentinels must be from 0 to 1,048,576, not 9,999,999"),
        (["--vocabulary-size", str(2**63)], "--vocabulary-size must be from 1 to 16,777,216"),
        (["--sample", "0"], "--sample must be from 1 to"),
        (["--held-out", "0.5"], "--held-out is a share from 0 to below 0.5"),
        (["--text-field", "body"], "no field 'body'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(given, said, source, tmp_path, capsys):
    assert tool("tokenizer")(command(source, tmp_path / "t.model", *given)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("tokenizer.py:") == 1
    assert not (tmp_path / "t.model").exists()


def test_a_file_is_not_overwritten(source, tmp_path, capsys):
    (tmp_path / "t.model").write_text("mine")
    assert tool("tokenizer")(command(source, tmp_path / "t.model")) == 2
    assert "t.model exists" in capsys.readouterr().err
    assert (tmp_path / "t.model").read_text() == "mine"
