"""Files from elsewhere: pipes, endless devices, multiplying aliases, names that lead out of a folder, and
JSON of another form. Each command says one sentence, soon, and writes nothing."""

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from megaarch import config, files
from megaarch.cli import main
from megaarch.cluster import status
from megaarch.ingest import corpus, shards
from megaarch.ingest.lines import Shard
from megaarch.ingest.manifest import DatasetManifest
from megaarch.study import lock
from megaarch.study.results import CellRecord, Sweep
from megaarch.training import metrics
from tests.conftest import made_up_text
from tests.fuzz.isolated import isolated
from tests.tools.run import tool
from tools.planning import at_scale

pytestmark = pytest.mark.slow

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.fixture
def file(raw, tmp_path):
    mine = copy.deepcopy(raw)
    mine["logging"]["directory"] = str(tmp_path / "run")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(mine))
    return path


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def refused(call, capsys, *words):
    assert call() == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("\n") == 1
    for word in words:
        assert word in error


def _locked(path):
    path.rename(path.with_name("lock"))
    with lock.alone(path.parent, "study"):
        pass


READERS = {
    "lock": _locked,
    "held lock": lambda path: lock.is_held(path.rename(path.with_name("lock")).parent),
    "bytes": files.read_bytes,
    "checksum": files.size_and_checksum,
    "metrics": lambda path: list(metrics.read_lines(path)),
    "last lines": status._last_lines,
    "records": lambda path: list(corpus.read(Shard(path.rename(path.with_name("a.jsonl"))))),
    "text": lambda path: list(corpus.read(Shard(path.rename(path.with_name("a.txt"))))),
    "compressed": lambda path: list(corpus.read(Shard(path.rename(path.with_name("a.jsonl.gz"))))),
    "parquet": lambda path: list(corpus.read(Shard(path.rename(path.with_name("a.parquet"))))),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_a_pipe(reader, pipe):
    """In a fork of this process, as below."""

    def call():
        with pytest.raises(ValueError, match="is a pipe or a device: give a regular file"):
            READERS[reader](pipe)
        return 0

    found = isolated(call, pipe.parent, 10, 30)
    assert found.code == 0, found


@pytest.mark.parametrize("endless", ["pipe", "/dev/zero", "/dev/stdin"])
@pytest.mark.parametrize("reader", ["config", "tokenizer", "preprocess"])
def test_a_pipe_or_device_is_refused_by_name(reader, endless, file, pipe, tmp_path):
    """In a fork of this process: what hangs is ended."""
    path = str(pipe) if endless == "pipe" else endless
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    given = ["--input", str(text), "--output", str(tmp_path / "out"), "--tokenizer", path]
    command = {
        "config": lambda: main(["train", path]),
        "tokenizer": lambda: main(["train", str(file), "--set", f"data.tokenizer={path}"]),
        "preprocess": lambda: preprocess(given),
    }[reader]
    preprocess = tool("preprocess")
    ends, other = os.pipe()

    def call():
        os.dup2(ends, 0)  # a pipe that never ends is its stdin
        return command()

    try:
        done = isolated(call, tmp_path, bound=60, patience=300)
    finally:
        os.close(ends)
        os.close(other)
    assert done.code == 2
    assert "is a pipe or a device" in done.error and "Traceback" not in done.error


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "a: &a {x: 1, y: 2}\nb: &b {<<: [" + ", ".join(["*a"] * 60_000) + "]}\n",
        "".join(f"a{n}: &a{n} {{k: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)).replace(
            "*a0", "x"
        ),
    ],
)
def test_aliases_that_multiply_are_refused(text, tmp_path, capsys):
    path = tmp_path / "laughs.yaml"
    path.write_text(text)
    refused(lambda: main(["train", str(path)]), capsys, "laughs.yaml", "aliases repeat it")


def test_aliases_that_do_not_multiply_are_read(tmp_path):
    path = tmp_path / "shared.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    assert config.read_yaml(path)["b"] == {"x": 1, "y": 2}
    with pytest.raises(config.ConfigError, match="not a YAML value"):
        config.parse_override("a.b=&a [*a]")


def test_a_configuration_is_no_large_file(tmp_path, capsys):
    path = tmp_path / "large.yaml"
    path.write_text("a: " + "x" * (1 << 19))
    refused(lambda: main(["train", str(path)]), capsys, "large.yaml has 524,291 bytes")


@pytest.mark.parametrize(
    "index",
    [
        [],
        None,
        {},
        {"weight_map": []},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": None}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "b\0c"}},
        {"weight_map": {"a": "pipe"}},
    ],
)
def test_a_safetensors_index_names_files_of_its_folder(index, tmp_path, capsys):
    folder = tmp_path / "hf"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    call = [str(folder), str(tmp_path / "out"), "--from", "hf"]
    refused(lambda: tool("convert")(call), capsys, str(folder))
    assert not (tmp_path / "out").exists()


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"text"', DEEP, "\0", "{}"])
def test_json_of_another_form_is_named_with_its_file(text, tmp_path):
    class Form(files.Schema):
        step: int

    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some\.json is (not JSON|damaged|nested)"):
        files.fit(files.read_json(path), Form, path)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a\0b", "b/../../a", "link"])
def test_an_entry_stays_in_its_folder(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="leads out of the folder|is no name of a file"):
        files.inside(folder, name)
    assert files.inside(folder, "b/a") == folder / "b" / "a"


ODD = [None, 3, "x", [], [[]], {}, {"a": {}}]


def test_a_damaged_manifest_beside_tokens_is_named(tmp_path):
    named = ("request", "tokenizer_file", "checksum")
    sound = {"request": {"tokenizer": "a"}, "tokenizer_file": "t", "checksum": {}}
    counted = ("documents", "duplicates", "train_documents", "train_bytes", "train_tokens")
    counted += ("heldout_documents", "heldout_bytes", "dropped_paragraphs", "malformed")
    sound |= dict.fromkeys(counted, 1) | {"malformed_records": []}
    path = tmp_path / "d.manifest.json"
    path.write_text(json.dumps(sound))
    assert DatasetManifest.read(str(tmp_path / "d")).train_tokens == 1
    for name in named:
        for value in (v for v in ODD if not (name == "checksum" and v == {})):
            if (name, value) == ("tokenizer_file", "x"):
                continue
            path.write_text(json.dumps(sound | {name: value}))
            with pytest.raises(ValueError, match=r"d\.manifest\.json is damaged"):
                DatasetManifest.read(str(tmp_path / "d"))
    path.write_text(json.dumps(sound | {"train_documents": "many"}))
    with pytest.raises(ValueError, match=r"damaged.*train_documents"):
        DatasetManifest.read(str(tmp_path / "d"))


def test_a_damaged_record_of_a_shard_is_made_anew(tmp_path):
    job = shards.Job(tmp_path, None)
    for end in shards.SUFFIXES:
        (tmp_path / f"00000000{end}").write_bytes(b"ab")
    marks = {
        end: list(files.size_and_checksum(tmp_path / f"00000000{end}")) for end in shards.SUFFIXES
    }
    counts = dict.fromkeys(("documents", "duplicates", "bytes"), 1)
    sound = counts | {"malformed": [[3, "no text"]], "files": marks}
    record = tmp_path / "00000000.json"
    record.write_text(json.dumps(sound))
    expected = shards.Summary(**counts, malformed=[(3, "no text")], files=marks)
    assert shards.finished(0, job) == expected
    for name in ("documents", "malformed", "files"):
        for value in ODD:
            if (name, value) in (("malformed", []), ("documents", 3)):
                continue
            record.write_text(json.dumps(sound | {name: value}))
            assert shards.finished(0, job) is None
    for value in ODD:
        record.write_text(json.dumps(sound | {"files": marks | {".bin": value}}))
        assert shards.finished(0, job) is None
    record.write_text(json.dumps(sound | {"files": {}}))
    assert shards.finished(0, job) is None
    record.write_text(DEEP)
    assert shards.finished(0, job) is None


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', DEEP, "{}"])
def test_a_damaged_plan_is_another_job(text, tmp_path, capsys):
    (tmp_path / "new.parts").mkdir()
    (tmp_path / "new.parts" / "plan.json").write_text(text)
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": made_up_text(i, 8)}) + "\n" for i in range(20)))
    model = str(tmp_path / "t.model")
    given = ["--input", str(corpus), "--output", model, "--vocabulary-size", "400"]
    assert tool("tokenizer")(given) == 0
    capsys.readouterr()
    given = ["--input", str(corpus), "--output", str(tmp_path / "new"), "--tokenizer", model]
    refused(lambda: tool("preprocess")(given), capsys, "holds part of a job with another format")


@pytest.mark.parametrize(
    "record",
    [
        *([], None, 3, {}, {"signature": []}, {"signature": {}, "result": 3}),
        {"signature": {}, "trial": {"cell": "a"}},
        {"signature": {}, "result": {"data": []}},
    ],
)
def test_a_damaged_cell_is_named(record, tmp_path):
    (tmp_path / "cell.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"cell\.json is damaged: .*remove its folder"):
        CellRecord.read(tmp_path)


def test_a_damaged_sweep_is_named(tmp_path):
    sound = {"best": {"gpt": 1e-3}, "settings": {}, "grid": [1e-3], "trials": []}
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(sound))
    assert Sweep.read(str(path)).as_json() == sound
    for name, values in {
        "best": [None, [], {"gpt": "x"}],
        "settings": [None, {"gpt": 3}],
        "grid": [None, [], ["x"], [None, 1.0]],
        "trials": [None, {}, [3], [{"cell": "gpt"}]],
    }.items():
        for value in values:
            path.write_text(json.dumps(sound | {name: value}))
            with pytest.raises(ValueError, match=rf"is not the rates\.json of a sweep: .*{name}"):
                Sweep.read(str(path))


def test_damaged_lines_of_metrics_are_left_out_of_the_state(tmp_path, capsys):
    line = {"step": 2, "seconds": 1.0, "flops": 1, "seen_tokens": 5, "loss": 3.0}
    line |= {"tokens_per_second": 5.0, "share": 0.5}
    file = tmp_path / "metrics.jsonl"
    odd = [{**line, name: value} for name in line for value in ("x", [], -1) if name != "loss"]
    odd += [{"step": 3}, line | {"step": 0}, [], None, line | {"loss": "x"}]
    odd = odd[-18:]  # the last 20 lines are read
    file.write_text("".join(json.dumps(found) + "\n" for found in (*odd, line)))
    assert main(["status", str(tmp_path), "--json"]) == 0
    (state,) = json.loads(capsys.readouterr().out)["states"]
    assert (state["step"], state["share"], state["loss"]) == (2, 0.5, 3.0)


def test_a_lock_of_anything_is_read(tmp_path):
    for text in ("host " + "9" * 5000, "host ٣", "\0", "host 99999999999", ""):
        path = tmp_path / "lock"
        path.write_text(text)
        with path.open("a+") as file:
            assert lock._lives(file) in (True, False)


@pytest.mark.parametrize("record", [[], None, {}, {"command": "a", "plans": [3], "dry_runs": []}])
def test_a_damaged_record_at_scale_is_named(record, tmp_path, capsys):
    path = tmp_path / "scale.json"
    path.write_text(json.dumps(record))
    refused(lambda: at_scale.main([str(path)]), capsys, "scale.json is damaged")


def test_a_replaced_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "record.json"
    files.write_json(path, {"steps": 1})
    with pytest.raises(RuntimeError, match="halfway"), files.replacing(path) as aside:
        aside.write_text('{"ste')
        raise RuntimeError("halfway")
    assert files.read_json(path) == {"steps": 1}
    files.write_json(path, {"steps": 2})
    assert files.read_json(path) == {"steps": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_file_that_cannot_be_replaced_is_told_by_its_own_name(tmp_path):
    path = tmp_path / "nowhere" / "a.json"
    with pytest.raises(FileNotFoundError) as told:
        files.write_json(path, {})
    assert told.value.filename == str(path)


def test_a_full_disk_is_told_with_the_file_that_was_to_be_replaced(tmp_path):
    with pytest.raises(OSError) as told, files.replacing(tmp_path / "a.json"):
        Path("/dev/full").write_text("{}")
    assert told.value.filename == str(tmp_path / "a.json")


def test_a_file_system_without_locks_gives_the_lock_with_a_warning(tmp_path, monkeypatch, caplog):
    """`megaarch compare` and preprocess.py run there; nothing else that goes wrong is taken for it."""
    with (tmp_path / "lock").open("w") as mine, (tmp_path / "lock").open("w") as other:
        assert files.take_lock(mine) and not files.take_lock(other)
    for number, caught in ((errno.ENOLCK, False), (errno.EIO, True)):

        def flock(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.fcntl, "flock", flock)
        with (tmp_path / "lock").open("w") as file:
            if caught:
                with pytest.raises(OSError, match="Input/output"):
                    files.take_lock(file)
            else:
                assert files.take_lock(file)
                assert "keeps no locks" in caplog.text
