"""GPUs that are not there: what torch says about them, and tensors that say they lie on one."""

import dataclasses
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megaarch.attention import packages
from megaarch.attention.packages import Gpu

NEWEST = 92700
GPUS = {
    "A100": Gpu((8, 0), 91900),
    "RTX 4090": Gpu((8, 9), 91900),
    "H100": Gpu((9, 0), 91900),
    "H100, an old cuDNN": Gpu((9, 0), 91500),
    "H100, a withdrawn cuDNN": Gpu((9, 0), 91001),
    "H100, the newest cuDNN": Gpu((9, 0), NEWEST),
    "B200": Gpu((10, 0), 92000),
    "B300": Gpu((10, 3), 92000),
    "RTX 5090": Gpu((12, 0), 92000),
    "without cuDNN": Gpu((9, 0), 0),
}
MODES = {
    f"{name}{', deterministic' * mode}": dataclasses.replace(gpu, deterministic=mode)
    for name, gpu in GPUS.items()
    for mode in (False, True)
}


@dataclass
class Machine:
    """Puts a GPU into this process. libraries: whether the optional packages are there."""

    monkeypatch: object

    def has(self, gpu: Gpu, libraries: bool = True) -> None:
        patch = self.monkeypatch.setattr
        patch(torch.cuda, "get_device_capability", lambda device=None: gpu.capability)
        patch(torch.backends.cudnn, "version", lambda: gpu.cudnn or None)
        patch(torch, "are_deterministic_algorithms_enabled", lambda: gpu.deterministic)
        builtin = "torch.nn.attention.varlen"
        patch(
            packages,
            "_missing",
            lambda p: None if libraries or p.module == builtin else f"{p.name} is not installed",
        )


def on_gpu(parts, heads=2, key_heads=2, size=64, dtype=torch.bfloat16):
    """q and k for these parts, without storage."""
    with FakeTensorMode():
        q = torch.empty(len(parts), parts.queries, heads, size, dtype=dtype, device="cuda")
        return q, torch.empty(len(parts), parts.keys, key_heads, size, dtype=dtype, device="cuda")
