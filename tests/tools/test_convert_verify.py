"""What a conversion is checked by, and the modes of what it writes."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from megaarch.ingest.prepare import prepare
from megaarch.interchange import files, verify
from megaarch.interchange.convert import settings_of
from tests.interchange.models import llama
from tests.tools.conversions import PIECES, convert, saved


def test_verification_sees_a_changed_tensor_and_changed_logits(
    words, tmp_path, monkeypatch, capsys
):
    folder, _ = saved("llama", words, tmp_path / "theirs")
    given = json.loads((folder / "config.json").read_text())
    assert convert(folder, tmp_path / "run") == 0
    write = files.write_safetensors

    def spoiled(file, saved):
        weights = {name: t.clone() for name, t in saved.weights.items()}
        weights["norm.weight"][0] += 1
        write(file, saved._replace(weights=weights))

    monkeypatch.setattr(files, "write_safetensors", spoiled)
    arguments = (tmp_path / "run", tmp_path / "a.safetensors", "--to", "safetensors")
    assert convert(*arguments, "--verify") == 2
    assert "1 tensors differ: norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()
    assert convert(*arguments, "--no-verify") == 0
    weights, record = files.read_checkpoint(tmp_path / "run")
    model = settings_of(record).model
    assert "differ by at most" in verify.check_logits(weights, model, folder, "llama", PIECES)
    given["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match="the logits differ by up to"):
        verify.check_logits(weights, model, folder, "llama", PIECES)


def test_without_room_for_a_comparison_it_is_left_out_unless_asked_for(
    words, tmp_path, monkeypatch, capsys
):
    folder, _ = saved("llama", words, tmp_path / "theirs")
    monkeypatch.setattr(verify, "BYTES", 10**12)
    assert convert(folder, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "without a comparison of logits: it takes" in out and "equal bit for bit" in out
    assert convert(folder, tmp_path / "asked", "--verify") == 0
    assert "random tokens differ by at most" in capsys.readouterr().out
    assert convert(folder, tmp_path / "without", "--no-verify") == 0
    assert "equal bit for bit" not in capsys.readouterr().out


def test_without_transformers_only_tensors_are_compared(words, tmp_path, monkeypatch, capsys):
    folder, _ = saved("gpt2", words, tmp_path / "theirs")
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert convert(folder, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "without a comparison of logits: transformers is missing" in out
    assert convert(folder, tmp_path / "asked", "--verify") == 2
    assert "pip install transformers" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()


def test_what_transformers_cannot_run_is_not_taken_for_right(words, tmp_path, capsys):
    folder, _ = saved("gpt2", words, tmp_path / "theirs")
    given = json.loads((folder / "config.json").read_text()) | {"use_cache": "sometimes"}
    (folder / "config.json").write_text(json.dumps(given))
    assert convert(folder, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "cannot run it" in error and "use_cache" in error and "--no-verify" in error
    assert convert(folder, tmp_path / "run", "--no-verify") == 0


@pytest.mark.parametrize("seed", range(3))
def test_sharp_attention_is_right_within_fp32s_own_error(seed, words, tmp_path, capsys):
    folder, model = saved("t5-v1.0", words, tmp_path / "theirs")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if ".q." in name or ".k." in name:
                p.normal_(generator=generator)
    model.save_pretrained(folder)
    assert convert(folder, tmp_path / "run", "--verify") == 0
    weights, record = files.read_checkpoint(tmp_path / "run")
    weights = dict(weights)
    weights["layers.0.attention.qkv.weight"] *= 1.01
    with pytest.raises(ValueError, match="the logits differ by up to"):
        verify.check_logits(weights, settings_of(record).model, folder, "t5", PIECES)


def peak_beside(what):
    """The most memory of this process in the course of `what`, in bytes, beside what it had."""

    def found(name):
        return next(
            1024 * int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = found("VmRSS")
    assert what() == 0
    return found("VmHWM") - before


def test_a_conversion_holds_a_few_tensors_and_not_the_model(words, tmp_path, monkeypatch):
    """Every way in and out, each tensor compared."""
    monkeypatch.setattr(verify, "find_spec", lambda name: None)  # no logits: both models are whole
    torch.manual_seed(1)
    model = llama(hidden_size=480, intermediate_size=1536, num_hidden_layers=12)
    model.save_pretrained(tmp_path / "theirs")
    shutil.copyfile(words, tmp_path / "theirs" / "tokenizer.json")
    size = sum(4 * p.numel() for p in model.parameters())
    del model
    ways = (
        ("theirs", "checkpoint"),
        ("checkpoint", "safetensors"),
        ("safetensors", "checkpoint"),
        ("checkpoint", "hf"),
    )
    for turn in range(2):  # the first one imports what it needs
        made = {"theirs": tmp_path / "theirs"}
        for source, to in ways:
            output = tmp_path / f"{turn}-{source}-{to}"
            peak = peak_beside(lambda: convert(made[source], output, "--to", to))  # noqa: B023
            assert turn == 0 or peak < size / 3, (source, to, peak, size)
            made[to] = output


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_and_folders_get_the_mode_that_the_umask_leaves(mask, run, words, tmp_path, tiny):
    before = os.umask(mask)
    try:
        folder, settings = run(data__cache=str(tmp_path / "cache"))
        theirs, _ = saved("gpt2", words, tmp_path / "theirs")
        prepare(settings.data, settings.model.vocabulary_size)
        assert convert(folder, tmp_path / "out" / "a.safetensors", "--to", "safetensors") == 0
        assert convert(folder, tmp_path / "out" / "hf", "--to", "hf") == 0
        assert convert(theirs, tmp_path / "out" / "run", "--from", "hf") == 0
    finally:
        os.umask(before)
    written = [path for place in ("out", "cache") for path in (tmp_path / place).rglob("*")]
    written += list(folder.rglob("*"))
    assert len(written) > 15
    for path in written:
        usual = 0o777 if path.is_dir() else 0o666
        assert oct(path.stat().st_mode & 0o777) == oct(usual & ~mask), path


def test_free_memory_is_that_of_the_tightest_control_group(tmp_path, monkeypatch):
    """A SLURM step's limit lies below the root."""
    (tmp_path / "self").write_text("0::/slurm/job_7/step_0\n")
    for group, limit in (("slurm", "max"), ("slurm/job_7", "5000"), ("slurm/job_7/step_0", "9000")):
        folder = tmp_path / "groups" / group
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("2000\n")
        (folder / "memory.stat").write_text("anon 1300\nactive_file 300\ninactive_file 400\n")
    groups = partial(verify._control_groups, tmp_path / "self", tmp_path / "groups")
    assert len(groups()) == 4
    monkeypatch.setattr(verify, "_control_groups", groups)
    assert verify._free_bytes() == 3700  # read files give way
