"""Plans: what it takes on the host to derive the kernels' metadata from a batch's parts, and what is
left of that in the step where a loader's worker has done it.

Processor time of one process, which a neighbour's load does not inflate.
"""

import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from megaarch.attention import Parts, warm
from tools.throughput import masks


def run(
    mask_names: list[str],
    rows: int,
    lengths: list[int],
    device_type: str,
    kernels: list[str],
    repetitions: int,
    seed: int,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One record for each (length, mask, kernel)."""
    found = []
    for length in lengths:
        for mask in mask_names:
            parts = masks.draw(mask, rows, length, np.random.default_rng(seed))
            for kernel in kernels:
                found.append(_record(parts, mask, kernel, device_type, repetitions))
                r = found[-1]
                show(
                    f"{mask:<15}{kernel:<13}{rows:>4} x {length:<6}{r['parts']:>5} parts   built "
                    f"{r['built_ms']:>7.2f} ms   received {r['received_ms']:>6.2f} ms   "
                    f"{r['bytes']:>9,} bytes"
                )
    return found


def _record(
    parts: Parts, mask: str, kernel: str, device_type: str, repetitions: int
) -> dict[str, Any]:
    def build() -> Parts:
        return warm(replace(parts), device_type, kernel)

    bare, sent = pickle.dumps(parts), pickle.dumps(build())
    built = _milliseconds(build, repetitions)
    received = _milliseconds(lambda: pickle.loads(sent), repetitions)
    return {
        "label": f"{mask}, {parts.queries}",
        "mask": mask,
        "kernel": kernel,
        "rows": len(parts),
        "length": parts.keys,
        "parts": int((parts.table[:, :, 0] != 0).sum()),
        "built_ms": built,
        "received_ms": received,
        "bytes": len(sent) - len(bare),
    }


def _milliseconds(action: Callable[[], Any], repetitions: int) -> float:
    """Median processor time of an action."""
    seconds = []
    for _ in range(repetitions):
        started = time.process_time()
        action()
        seconds.append(time.process_time() - started)
    return 1e3 * float(np.median(seconds))
