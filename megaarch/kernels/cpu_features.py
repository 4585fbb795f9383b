"""What the host's processor is good at."""

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def description() -> dict[str, str]:
    """Returns what the system tells of its first processor, as `vendor_id` and `model name`; empty where
    it tells nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in first}


def name() -> str:
    return description().get("model name") or platform.processor() or platform.machine()


def has_units_for_half() -> bool:
    """Whether it multiplies matrices of bfloat16 by itself; otherwise torch emulates that."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def multiplies_faster_by_onednn() -> bool:
    """Whether oneDNN's products in fp32 are faster than MKL's, which uses AVX-512 on Intel's processors
    alone. A rule and no measurement, for a run that goes on must round as it did (docs/log.md)."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_supported()
        and description().get("vendor_id") != "GenuineIntel"
    )
