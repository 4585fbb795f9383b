"""A safetensors file of ours whose tensors are not those of the settings in it."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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
