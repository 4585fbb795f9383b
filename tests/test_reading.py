"""Files from elsewhere: pipes, endless devices, multiplying aliases, names that lead out of a folder, and
JSON of another form. Each command says one sentence, soon, and writes nothing."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megaarch import config, reading
from megaarch.cli import main
from tests.tools.run import tool

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize("endless", ["pipe", "/dev/zero", "/dev/stdin"])
@pytest.mark.parametrize("reader", ["config", "tokenizer", "preprocess"])
def test_a_pipe_or_device_is_refused_by_name(reader, endless, file, pipe, tmp_path):
    """In a process of its own: what hangs is ended."""
    path = str(pipe) if endless == "pipe" else endless
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    command = {
        "config": ["-m", "megaarch", "train", path],
        "tokenizer": ["-m", "megaarch", "train", str(file), "--set", f"data.tokenizer={path}"],
        "preprocess": [
            "tools/preprocess.py",
            *("--input", str(text), "--output", str(tmp_path / "out"), "--tokenizer", path),
        ],
    }[reader]
    ends, other = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, *command],
            stdin=ends,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    finally:
        os.close(ends)
        os.close(other)
    assert done.returncode == 2
    assert "is a pipe or a device" in done.stderr and "Traceback" not in done.stderr


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
    class Form(reading.Schema):
        step: int

    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some\.json is (not JSON|damaged|nested)"):
        reading.fit(reading.read_json(path), Form, path)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a\0b", "b/../../a", "link"])
def test_an_entry_stays_in_its_folder(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="leads out of the folder|is no name of a file"):
        reading.inside(folder, name)
    assert reading.inside(folder, "b/a") == folder / "b" / "a"
