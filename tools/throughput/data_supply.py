"""Data: rows a second of objective, feature converter and packing, against what training takes.

One worker process makes them; `workers_needed` says how many keep up with one H200 that trains a
model of a billion parameters at half of its data sheet's rate.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from megaarch import config
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.ingest.prepare import prepare
from megaarch.model import flops
from megaarch.training.utilization import PEAKS
from tools.throughput.timing import Times
from tools.throughput.training import of_preset

UTILIZATION = 0.5
# 1.04 B parameters without embedding as a causal decoder with a gated feed-forward
BILLION = {
    "layers": 20,
    "hidden_size": 2048,
    "heads": 16,
    "feed_forward_size": 5632,
    "encoder_layers": None,
    "decoder_layers": None,
}


def run(
    raw: config.Raw, presets: list[str], steps: int, device_type: str, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One record a preset. Rounds go over all presets, so that noise hits them alike."""
    sources = {}
    for preset in presets:
        settings = config.resolve(of_preset(raw, preset))
        prepared = prepare(settings.data, settings.model.vocabulary_size)
        rows = Rows(settings.model, settings.data, prepared, settings.training.seed)
        size = settings.training.micro_batch_size
        sources[preset] = (
            settings,
            Steps(rows, global_batch_size=size, micro_batch_size=size, device_type=device_type),
        )
    seconds: dict[str, list[float]] = {preset: [] for preset in presets}
    counts: dict[str, Any] = {}
    for step in range(steps + 1):
        for preset, (_, source) in sources.items():
            started = time.perf_counter()
            (batch,) = source[step]
            if step:  # the first one fills caches
                seconds[preset].append(time.perf_counter() - started)
                counts[preset] = counts[preset] + batch.counts if step > 1 else batch.counts
    found = [
        _record(preset, sources[preset][0], counts[preset], seconds[preset]) for preset in presets
    ]
    for r in found:
        show(
            f"{r['preset']:<10}{r['rows_per_second']:>10,.0f} rows/s "
            f"{r['tokens_per_second']:>14,.0f} tokens/s {r['supply_to_demand']:>8.2f} x demand"
        )
    return found


def _record(preset: str, settings, counts, seconds: list[float]) -> dict[str, Any]:
    times = Times(tuple(seconds))
    rows = settings.training.micro_batch_size
    rate = rows / times.median
    model = settings.model.model_copy(update=BILLION | {"kv_heads": None, "head_size": None})
    cost = flops.training(model, counts) / counts.rows  # of a row
    demand = UTILIZATION * PEAKS["H200"] / cost
    return {
        "preset": preset,
        "batch": times.record(),
        "rows_per_second": rate,
        "tokens_per_second": rate * sum(counts.tokens) / counts.rows,
        "demand_rows_per_second": demand,
        "supply_to_demand": rate / demand,
        "workers_needed": math.ceil(demand / rate),
    }
