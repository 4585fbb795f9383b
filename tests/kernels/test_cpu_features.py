"""The library that multiplies in fp32, by the processor."""

import pytest
import torch

from megaarch.kernels import cpu_features


@pytest.mark.parametrize(
    ("vendor", "avx512", "onednn"),
    [
        ("AuthenticAMD", True, True),  # MKL keeps to AVX2 there
        ("AuthenticAMD", False, False),
        ("GenuineIntel", True, False),
        ("GenuineIntel", False, False),
        (None, True, True),
    ],
)
def test_onednn_multiplies_where_mkl_leaves_avx512_alone(vendor, avx512, onednn, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    told = {} if vendor is None else {"vendor_id": vendor}
    monkeypatch.setattr(cpu_features, "description", lambda: told)
    assert cpu_features.multiplies_faster_by_onednn() == onednn


def test_the_name_of_the_first_processor_is_read(tmp_path, monkeypatch):
    text = "processor\t: 0\nvendor_id\t: V\nmodel name\t: A: B\n\nprocessor\t: 1\nmodel name\t: C\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_features, "Path", lambda _: tmp_path / "cpuinfo")
    cpu_features.description.cache_clear()
    try:
        assert (cpu_features.name(), cpu_features.description()["vendor_id"]) == ("A: B", "V")
    finally:
        cpu_features.description.cache_clear()
