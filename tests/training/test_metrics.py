"""metrics.jsonl after a crash: what is damaged is left out and named, the rest is kept."""

import json
from pathlib import Path

import pytest
import torch

from megaarch.cli.errors import user_sentence
from megaarch.config.schema import Logging
from megaarch.training.metrics import Metrics, cut_back, read_lines
from megaarch.training.trainer import Trainer
from megaarch.training.utilization import of_step, peak_flops

DAMAGED = ["\0" * 300, "{", "[1]", "3", "null", '{"loss": 1}', '{"step": "4"}', "[" * 3000]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_leaves_the_rest(damage, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    sound = [json.dumps({"step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join([sound[0], damage, *sound[1:]]) + "\n")
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert "metrics.jsonl: line 2 is damaged and left out" in caplog.text
    cut_back(path, 2)
    assert path.read_text() == "\n".join(sound[:2]) + "\n"


def test_nuls_before_a_sound_line_are_no_part_of_it(tmp_path):
    """As a crash and then an append leave them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "\0" * 100 + '{"step": 2}\n')
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_a_run_whose_metrics_hold_nuls_goes_on(tiny, prepared, tmp_path):
    Trainer(tiny(training__steps=3), prepared).run()
    path = tmp_path / "run" / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, "\0" * 4096, *rest]) + "\n")
    Trainer(tiny(training__steps=5), prepared).run()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    metrics = Metrics(Logging(directory=str(tmp_path), tensorboard=False), 0, {})
    metrics.file.close()
    with Path("/dev/full").open("a", buffering=1) as metrics.file:
        for use in (lambda: metrics.write({"step": 1}), metrics.close):
            with pytest.raises(OSError) as told:
                use()
            assert user_sentence(told.value) == f"{tmp_path}/metrics.jsonl: No space left on device"


def test_a_run_on_gpus_tells_its_utilization_and_memory(tiny, prepared, tmp_path, monkeypatch):
    """MFU by the FLOPs of all ranks, over the peak of all their GPUs; on a CPU there is none."""
    trainer = Trainer(tiny(training__steps=1), prepared)
    trainer.run()
    (line,) = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").open()]
    assert "mfu" not in line and "peak_memory" not in line
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 5)
    gpu = torch.device("cuda", 0)
    found = of_step(int(989.4e12), 0.5, gpu, ranks=4)
    assert found == {"mfu": pytest.approx(0.5), "peak_memory": 5}
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "another maker's")
    assert of_step(1, 0.5, gpu, ranks=4) == {"peak_memory": 5}


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H20", 148),
    ],
)
def test_a_name_has_its_own_peak(name, teraflops, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == teraflops * 1e12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"{name} MIG 1g.10gb")
    assert peak_flops(torch.device("cuda")) is None
