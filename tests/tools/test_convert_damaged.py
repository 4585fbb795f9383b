"""Safetensors files that are damaged, name others wrongly or cannot be read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megaarch.interchange import files
from tests.tools.conversions import convert

WEIGHT = "layers.0.attention.qkv.weight"
DAMAGES = {
    "missing": (lambda t: t.pop(WEIGHT), f"lacks {WEIGHT}"),
    "extra": (lambda t: t.update(more=torch.zeros(2)), "has more, which"),
    "shape": (lambda t: t.update({WEIGHT: t[WEIGHT][1:].clone()}), f"has {WEIGHT} of shape ["),
    "type": (lambda t: t.update({WEIGHT: t[WEIGHT].int()}), f"has {WEIGHT} of torch.int32"),
}


@pytest.fixture
def sound(run, tmp_path):
    folder, _ = run()
    assert convert(folder, tmp_path / "sound.safetensors", "--to", "safetensors") == 0
    return tmp_path / "sound.safetensors"


def metadata(file):
    with safe_open(file, "pt") as tensors:
        return tensors.metadata()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("to", ["hf", "safetensors", "checkpoint"])
def test_a_tensor_that_does_not_fit_is_one_sentence(to, damage, sound, tmp_path, capsys):
    change, said = DAMAGES[damage]
    tensors = load_file(sound)
    change(tensors)
    file = tmp_path / "damaged.safetensors"
    save_file(tensors, file, metadata(sound))
    capsys.readouterr()
    assert convert(file, tmp_path / "out", "--to", to) == 2
    error = capsys.readouterr().err
    assert f"convert.py: {file} {said}" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b.safetensors", "/a.safetensors"])
def test_an_index_names_files_of_its_folder_alone(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="json names .*, which is no file of its folder"):
        files.read_hf(tmp_path)


def test_a_file_that_may_not_be_read_is_there(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # folders above are its owner's alone
    user = os.geteuid()
    try:
        if user == 0:  # who may read all
            os.seteuid(65534)
        with pytest.raises(ValueError, match="^a.safetensors cannot be read.*Permission denied"):
            files.read_safetensors(Path("a.safetensors"))
    finally:
        os.seteuid(user)
