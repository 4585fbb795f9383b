"""How well a GPU is used: model FLOPs utilization (MFU) by exact FLOPs, and memory at its fullest."""

import torch

# FLOP/s, dense bf16, by a part of the name that CUDA reports: NVIDIA's data sheets. The first one counts.
PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989.4e12,  # and GH200
    "H20": 148e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800 PCIe": 756e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Returns the FLOP/s that MFU is a share of; None for a device whose data sheet is not in PEAKS, and for a
    part of a GPU (MIG)."""
    if device.type != "cuda" or "MIG" in (name := torch.cuda.get_device_name(device)):
        return None
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def of_step(flops: int, seconds: float, device: torch.device, ranks: int) -> dict[str, float]:
    """Returns what metrics say of a step of `flops` exact FLOPs on all ranks, each with a GPU as `device`: mfu,
    where the peak is known, and the most bytes that tensors of this rank took since the run began,
    peak_memory; nothing on a CPU."""
    found: dict[str, float] = {}
    if peak := peak_flops(device):
        found["mfu"] = flops / (seconds * peak * ranks)
    if device.type == "cuda":
        found["peak_memory"] = torch.cuda.max_memory_allocated(device)
    return found
