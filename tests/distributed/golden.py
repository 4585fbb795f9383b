"""Golden runs: five steps of every preset in one process, under tp2 and under pp2, as recorded.

    python -m tests.distributed.golden          # records golden.json anew: say why in the commit

A change of the code that is not meant to change what a run computes leaves losses, gradient norms
and the checkpoint's tensors bit-equal. Products round differently on other processors and
versions of torch, so the record says where it comes from; elsewhere it holds within a tolerance.
"""

import hashlib
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from megaarch.checkpoint import storage
from megaarch.kernels.cpu_features import description
from tests import conftest
from tests.distributed import runs
from tests.distributed.layouts import DEEPER, PP2, TP2
from tests.distributed.pool import Pool

FILE = Path(__file__).with_name("golden.json")
LAYOUTS = {"one process": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2)}
STEPS = 5

Run = dict[
    str, Any
]  # losses, norms: of each step; weight_norm; digest: of the checkpoint's tensors


def place() -> dict[str, str]:
    """What decides how products round here."""
    return {
        "torch": torch.__version__,
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def processor() -> str:
    """The vendor, family and model of the processor, where the system tells them."""
    found = description()
    if not found:
        return platform.processor()
    return "/".join(found.get(name, "?") for name in ("vendor_id", "cpu family", "model"))


def train(raw: dict[str, Any], presets: list[str], given: dict[str, Any], folder: str) -> dict:
    """Trains each preset, saves it below `folder`, and returns its Run without the checkpoint's."""
    return {preset: _train(raw, preset, given, folder) for preset in presets}


def _train(raw: dict[str, Any], preset: str, given: dict[str, Any], folder: str) -> Run:
    more = {"logging.directory": f"{folder}/{preset}", "training.warmup": 0.4}
    trainer = runs.trainer_of(runs.settings_of(raw, preset, DEEPER | given | more))
    steps = [trainer.step(trainer.steps[s]) for s in range(STEPS)]
    trainer.save()
    trainer.saver.finish()
    return {"losses": [s.loss for s in steps], "norms": [s.gradient_norm for s in steps]}


def measure(raw: dict[str, Any], presets: list[str], layout: str, pool: Pool, folder: Path) -> dict:
    """The Run of each preset in a layout."""
    processes, given = LAYOUTS[layout]
    found = pool.run(processes, train, raw, presets, given, str(folder))[0]
    for preset, run in found.items():
        (state,) = (folder / preset).glob("checkpoints/step-*/state")
        tensors = storage.read_whole(state)
        weights = [t for name, t in tensors.items() if name.startswith("model.")]
        assert weights, sorted(tensors)[:3]
        run["weight_norm"] = float(sum(t.double().square().sum() for t in weights).sqrt())
        run["digest"] = digest(tensors)
    return found


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    presets = list(conftest.PRESETS)
    record: dict[str, Any] = {"place": place(), "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        raw = conftest.tiny_raw(conftest.write_corpus(Path(folder)), Path(folder) / "cache")
        for layout in LAYOUTS:
            record["runs"][layout] = measure(raw, presets, layout, Pool(), Path(folder) / layout)
    FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
