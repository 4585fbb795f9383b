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


class Utilization:
    """What a run's metrics say of its GPUs; nothing on a CPU.

    device: of this process. ranks: of the run, each with a GPU as this one.
    """

    def __init__(self, device: torch.device, ranks: int):
        self.device, self.ranks = device, ranks
        self.peak = peak_flops(device)

    def of_step(self, flops: int, seconds: float) -> dict[str, float]:
        """Returns the numbers of a step of `flops` exact FLOPs on all ranks: mfu, where the peak is known, and
        the most bytes that tensors of this rank took since the run began, peak_memory."""
        found: dict[str, float] = {}
        if self.peak:
            found["mfu"] = flops / (seconds * self.peak * self.ranks)
        if self.device.type == "cuda":
            found["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
        return found
