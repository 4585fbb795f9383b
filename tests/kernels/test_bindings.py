"""The libraries: what is said where one is missing, and that CUDA's compiles."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megaarch.kernels import bindings
from megaarch.training.trainer import Trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_an_installation_with_a_compiler_has_the_cpus():
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler: torch's kernels run")
    assert bindings.obstacle("cpu") is None


def test_a_run_that_asks_for_what_is_not_built_says_how_to_build_it(tiny, prepared, monkeypatch):
    def absent(device_type):
        raise FileNotFoundError(device_type)

    monkeypatch.setattr(bindings, "load", absent)
    settings = tiny("gpt", model__fused_kernels=["rms_norm"])
    with pytest.raises(ValueError, match="model.fused_kernels: the kernels for cpu are not built"):
        Trainer(settings, prepared)
    assert "nvcc and a torch with CUDA" in bindings.obstacle("cuda")


def test_a_library_of_an_earlier_version_is_told_and_torch_runs(monkeypatch):
    """As after an update without a build: not a crash, and not half of the functions."""
    if bindings.obstacle("cpu"):
        pytest.skip(bindings.obstacle("cpu"))
    path = Path(bindings.__file__).with_name("cpu.so")
    monkeypatch.setitem(bindings._OF_CPU, "heads_sideways", "p")
    monkeypatch.setattr(bindings, "load", lambda device: bindings.open_library(path, device))
    assert re.search(r"do not load \(heads_sideways is not in .*: build", bindings.obstacle("cpu"))
    assert not bindings.serves(torch.zeros(3))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_compiles_for_ampere_and_hopper(tmp_path):
    """Every function that Python calls is in the library, which holds code for both."""
    path = tmp_path / "cuda.so"
    build = subprocess.run(
        [ROOT / "csrc/cuda/build.sh", path, "--resource-usage"], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    compiled = ctypes.CDLL(str(path))
    for name in bindings._SIGNATURES:
        assert getattr(compiled, f"megaarch_{name}")
    for architecture in ("sm_80", "sm_90a"):
        assert f"for '{architecture}'" in build.stderr
    assert " bytes spill stores" in build.stderr
    assert {line.split()[4] for line in build.stderr.splitlines() if "spill stores" in line} == {
        "0"
    }
