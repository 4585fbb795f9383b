"""Preprocessing: the tokens and the split of prepare, whoever makes them, and after any stop."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megaarch.config.schema import Data
from megaarch.ingest import corpus, indexed_dataset, preprocess, shards
from megaarch.ingest.indexed_dataset import IndexedDataset
from megaarch.ingest.lines import Shard
from megaarch.ingest.prepare import prepare
from megaarch.ingest.tokenizer import Tokenizer, train_sentencepiece
from tests.tools.preprocessing import OUTPUTS, command, document
from tests.tools.run import TOOLS, tool


def contents(prefix):
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in OUTPUTS}


@pytest.fixture
def settings(source, tokenizer, tmp_path):
    return Data(
        source=str(source), tokenizer=tokenizer, sentinels=10, cache=str(tmp_path / "cache")
    )


def test_the_same_files_as_prepare_makes_of_the_text(made, settings):
    prepared = prepare(settings, 400)
    ((train, _),) = prepared.train
    for suffix in (".bin", ".idx"):
        assert Path(train.path + suffix).read_bytes() == Path(f"{made}{suffix}").read_bytes()
    lines = Path(f"{made}.heldout.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in lines if line] == prepared.heldout
    manifest, ours = json.loads(Path(f"{made}.manifest.json").read_text()), prepared.manifest
    for count in ("documents", "duplicates", "train_documents", "train_bytes", "train_tokens"):
        assert manifest[count] == getattr(ours, count)
    for count in ("heldout_documents", "heldout_bytes", "dropped_paragraphs"):
        assert manifest[count] == getattr(ours, count)
    assert manifest["duplicates"] == 3 and manifest["dropped_paragraphs"] > 0
    assert sorted(path.name for path in made.parent.iterdir()) == sorted(
        "x" + suffix for suffix in OUTPUTS
    )


def test_datasets_that_hold_out_other_shares_are_told_of(
    made, source, tokenizer, settings, tmp_path
):
    """What one of them holds out the other may train on."""
    told = "these datasets hold out different shares"
    for share, said in (("0", True), ("0.1", False)):
        other = tmp_path / f"held{share}"
        assert tool("preprocess")(command(source, tokenizer, other, "--held-out", share)) == 0
        both = [{"path": f"{path}.bin", "weight": 1.0} for path in (made, other)]
        blended = prepare(Data.model_validate(settings.model_dump() | {"source": both}), 400)
        assert any(told in note for note in blended.manifest.notes) is said


def test_training_data_are_the_same_from_text_and_from_tokens(made, settings):
    text = prepare(settings, 400)
    tokens = prepare(settings.model_copy(update={"source": f"{made}.bin"}), 400)
    assert tokens.heldout == text.heldout != []
    other = {"key", "fingerprint", "kind", "source", "sources"}
    assert tokens.manifest.model_dump(exclude=other) == text.manifest.model_dump(exclude=other)
    assert tokens.tokenizer.fingerprint == text.tokenizer.fingerprint


@pytest.fixture
def copied(made, settings, tmp_path, monkeypatch):
    """Settings of a copy that is too large to be read in full at every start."""
    for suffix in OUTPUTS:
        shutil.copy2(f"{made}{suffix}", tmp_path / f"y{suffix}")
    monkeypatch.setattr(indexed_dataset, "WHOLE", 1 << 10)
    monkeypatch.setattr(indexed_dataset, "SAMPLES", 2)
    monkeypatch.setattr(indexed_dataset, "SAMPLE_BYTES", 1 << 7)
    return settings.model_copy(update={"source": str(tmp_path / "y.bin")})


def change(file):
    """Another token in the middle of a file, where no sample is taken."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 4 * 2] ^= 1
    file.write_bytes(raw)


def test_tokens_that_changed_since_they_were_made_are_refused(copied):
    first = prepare(copied, 400)
    change(Path(copied.source))
    assert IndexedDataset(copied.source[:-4]).checksum() == first.manifest.checksums[0]
    with pytest.raises(ValueError, match=r"y\.bin has changed since it was made: restore it"):
        prepare(copied, 400)


def test_a_source_is_read_in_full_once_for_each_of_its_times(copied, monkeypatch):
    honest, read = IndexedDataset.digest, []
    monkeypatch.setattr(
        IndexedDataset, "digest", lambda d, *look: read.append(d.path) or honest(d, *look)
    )
    first = prepare(copied, 400)
    os.utime(copied.source, ns=(1, 1))
    for _ in range(2):
        assert prepare(copied, 400).fingerprint == first.fingerprint
    assert read == [copied.source[:-4]] * 2


def test_all_tokens_enter_the_fingerprint_where_nothing_is_recorded(copied):
    Path(copied.source).with_suffix(".manifest.json").unlink()
    first = prepare(copied, 400)
    change(Path(copied.source))
    other = prepare(copied, 400)
    assert other.manifest.checksums == first.manifest.checksums
    assert other.fingerprint != first.fingerprint


def test_another_tokenizer_than_the_recorded_one_is_refused(made, settings, tmp_path):
    other = tmp_path / "other.model"
    train_sentencepiece([document(5)], 400, 10, other)
    given = {"source": f"{made}.bin", "tokenizer": str(other)}
    with pytest.raises(ValueError, match=r"x\.bin was made with the tokenizer .*t\.model"):
        prepare(settings.model_copy(update=given), 400)


@pytest.mark.parametrize("size", ["997", "1000000"])
def test_neither_shards_nor_workers_change_the_files(
    size, source, tokenizer, made, tmp_path, capsys
):
    more = ["--shard-bytes", size, "--workers", "3"]
    assert tool("preprocess")([*command(source, tokenizer, tmp_path / "x"), *more]) == 0
    assert "documents/s" in capsys.readouterr().err
    ours, one = contents(tmp_path / "x"), contents(made)
    for suffix in OUTPUTS[:3]:
        assert ours[suffix] == one[suffix]


def test_mpi_ranks_change_no_file(source, tokenizer, made, tmp_path):
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": str(TOOLS.parent),
    }
    arguments = [TOOLS / "preprocess.py", *command(source, tokenizer, tmp_path / "x")]
    done = subprocess.run(
        [mpiexec, "--oversubscribe", "-n", "2", sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x.bin: ") == 1
    assert contents(tmp_path / "x") == contents(made)


KILLED = """
import os, signal, sys
from megaarch.ingest import shards
from tests.tools.run import tool
make = shards.make
def killed(number, *rest):
    if number == 7:
        (rest[1].folder / "00000007.1.aside").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return make(number, *rest)
shards.make = killed
tool("preprocess")(sys.argv[1:])
"""


def test_a_killed_job_continues_and_its_shards_are_verified(
    source, tokenizer, made, tmp_path, capsys, monkeypatch
):
    arguments = command(source, tokenizer, tmp_path / "x")
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=TOOLS.parent)
    assert killed.returncode == -signal.SIGKILL
    parts = tmp_path / "x.parts"
    assert not (tmp_path / "x.idx").exists()
    spoiled = parts / "00000002.bin"
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"\xff")
    again = []
    make = shards.make
    monkeypatch.setattr(
        shards, "make", lambda number, *rest: again.append(number) or make(number, *rest)
    )
    assert tool("preprocess")(arguments) == 0
    assert "6 of" in capsys.readouterr().err
    assert again[:2] == [2, 7] and not {0, 1, 3, 4, 5, 6} & set(again)
    assert contents(tmp_path / "x") == contents(made)
    assert not parts.exists()


def test_killed_while_the_output_is_put_in_place(source, tokenizer, made, tmp_path, monkeypatch):
    def killed(path, *_):
        if str(path) == f"{tmp_path / 'x'}.manifest.json":
            raise KeyboardInterrupt
        write(path, *_)

    arguments, write = command(source, tokenizer, tmp_path / "x"), preprocess.write_json
    monkeypatch.setattr(preprocess, "write_json", killed)
    assert tool("preprocess")(arguments) == 130
    assert (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    monkeypatch.undo()
    assert tool("preprocess")(arguments) == 0
    assert contents(tmp_path / "x") == contents(made)


def test_a_finished_job_does_nothing_and_another_one_is_refused(
    source, tokenizer, made, monkeypatch, capsys
):
    before = contents(made)
    monkeypatch.setattr(shards, "make", None)
    assert tool("preprocess")(command(source, tokenizer, made)) == 0
    assert f"x.bin: {len(IndexedDataset(made))} documents" in capsys.readouterr().out
    assert tool("preprocess")(command(source, tokenizer, made, "--held-out", "0.2")) == 2
    assert "x.bin exists and is not what this command makes" in capsys.readouterr().err
    assert contents(made) == before


def test_parts_of_another_job_and_a_job_at_work_are_left_alone(
    source, tokenizer, tmp_path, capsys, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    arguments = command(source, tokenizer, tmp_path / "x")
    monkeypatch.setattr(preprocess, "_finish", interrupted)
    assert tool("preprocess")(arguments) == 130
    assert tool("preprocess")([*arguments, "--no-append-eos"]) == 2
    assert "part of a job with another append_eos" in capsys.readouterr().err

    def meddled(*_, **__):
        assert tool("preprocess")(arguments) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess.Pipeline, "make", meddled)
    assert tool("preprocess")(arguments) == 130
    assert "another process is at work in it" in capsys.readouterr().err


def test_a_mistake_that_ended_a_job_before_its_first_shard_can_be_corrected(
    source, tokenizer, made, tmp_path, capsys
):
    """The same command with the right field was refused until the user deleted x.parts, which held nothing."""
    arguments = command(source, tokenizer, tmp_path / "x")
    assert tool("preprocess")([*arguments, "--text-field", "contnet"]) == 2
    assert "no field 'contnet'" in capsys.readouterr().err
    assert tool("preprocess")(arguments) == 0
    assert contents(tmp_path / "x") == contents(made)
    assert not (tmp_path / "x.parts").exists()


def test_every_format_gives_its_documents_in_order(tokenizer, tmp_path):
    texts = [document(seed) for seed in range(12)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = "".join(json.dumps({"body": text}) + "\n" for text in texts[:3]).encode()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    table = pyarrow.table({"body": texts[3:8], "other": [0] * 5})
    pyarrow.parquet.write_table(table, folder / "b.parquet", row_group_size=2)
    separated = "\n<|endoftext|>\n".join(texts[8:])
    (folder / "c.txt").write_text(separated)
    more = ["--text-field", "body", "--held-out", "0", "--shard-bytes", "400"]
    assert tool("preprocess")([*command(folder, tokenizer, tmp_path / "x"), *more]) == 0
    decoder, dataset = Tokenizer(tokenizer), IndexedDataset(tmp_path / "x")
    found = [decoder.decode(dataset[i]) for i in range(len(dataset))]
    assert [text.strip() for text in found] == [text.strip() for text in texts]
    assert all(dataset[i][-1] == decoder.vocabulary.eos for i in range(12))
    assert not (tmp_path / "x.heldout.jsonl").exists()


def test_without_the_end_of_document_token(source, tokenizer, made, tmp_path):
    arguments = command(source, tokenizer, tmp_path / "x", "--no-append-eos")
    assert tool("preprocess")(arguments) == 0
    ours, usual = IndexedDataset(tmp_path / "x"), IndexedDataset(made)
    assert len(ours) == len(usual)
    for i in range(len(ours)):
        assert np.array_equal(ours[i], usual[i][:-1])


def test_parts_of_a_file_give_its_lines_once(source):
    whole = list(corpus.documents(str(source)))
    size = source.stat().st_size
    for step in (1, 7, 1000, size - 1, size, size + 1):
        parts = list(shards.cut(str(source), step)) if step > 1 else []
        parts = parts or [Shard(source, at, at + 1) for at in range(0, 3000)]
        found = [text for part in parts for (text,) in corpus.read(part)]
        assert found == whole[: len(found)] and (step == 1 or found == whole)


STUCK = """
import sys
from megaarch.ingest import shards
from tests.tools.preprocessing import stuck
from tests.tools.run import tool
shards.make = stuck
sys.exit(tool("preprocess")(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(number, source, tokenizer, tmp_path):
    arguments = command(source, tokenizer, tmp_path / "x", "--workers", "2")
    leader = subprocess.Popen(
        [sys.executable, "-c", STUCK, *arguments],
        cwd=TOOLS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = [int(leader.stdout.readline()) for _ in range(2)]
    try:
        leader.send_signal(number)
        _, error = leader.communicate(timeout=60)  # the workers hold its ends of the pipes
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    if number == signal.SIGTERM:
        assert leader.returncode == 130
        assert error.count("interrupted; run the same command again to continue") == 1
        assert "Traceback" not in error
