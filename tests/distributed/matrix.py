"""The whole matrix: every preset in every layout against one process, in fp32, fp64 and bf16.

    python -m tests.distributed.matrix                 # all; writes the table of docs/parallelism.md
    python -m tests.distributed.matrix --layouts tp2 pp2 --presets gpt t5

It takes about half an hour on two idle cores. Exit code 1 where a run differs from one process by
more than 1e-5 in fp32 (weights after five steps of AdamW, epsilon 1e-6: 1e-4), 1e-10 in fp64, or in
bf16 by more than 2e-3 in any of 20 losses.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import rich
import torch
from rich.progress import track

from tests import conftest
from tests.distributed import runs
from tests.distributed.layouts import LAYOUTS, ZERO
from tests.distributed.pool import Pool

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
LIMITS = {"fp32": 1e-5, "fp64": 1e-10}
WEIGHTS = {"fp32": 1e-4, "fp64": 1e-10}
# At the tests' learning rate of 3e-3 without warmup BART's eighth step is on an edge (a gradient's norm
# of 116 after 1.2, in fp32 too), and no two roundings share its loss.
BF16 = {"training.precision": "bf16", "training.steps": 20, "training.learning_rate": 1e-3}
PRECISIONS = ("fp32", "fp64", "bf16")
LOSS_BF16 = 2e-3
ALL = LAYOUTS | ZERO


def measure(
    raw: dict, layouts: list[str], presets: list[str], precisions: list[str]
) -> dict[tuple, runs.Differences]:
    """(layout, precision, preset) -> the largest differences from one process."""
    pool, single, found = Pool(), {}, {}
    jobs = [(name, p) for name in layouts for p in precisions if not (name in ZERO and p == "fp64")]
    for name, precision in track(jobs, "layouts"):
        ranks, given, model = ALL[name]
        model = {"training.steps": 5} | model
        if precision == "bf16":
            model = model | BF16
        default = "fp64" if precision == "fp64" else "fp32"
        for preset in presets:
            key = (preset, precision, tuple(model.items()))
            if key not in single:
                single[key] = runs.run(raw, [preset], model, default)[preset]
        if name in ZERO:
            answers = pool.run(ranks, runs.zero_runs, raw, presets, model | given, timeout=3600)
        else:
            answers = pool.run(ranks, runs.run, raw, presets, model | given, default, timeout=3600)
        for preset, run in runs.merge(answers).items():
            wanted = single[preset, precision, tuple(model.items())]
            found[name, precision, preset], _ = runs.differences(run, wanted)
    return found


def within(precision: str, largest: runs.Differences) -> bool:
    """Returns whether a run counts as equal."""
    if precision == "bf16":
        return largest.loss < LOSS_BF16
    values = asdict(largest)
    weight = values.pop("weight")
    return max(values.values()) < LIMITS[precision] and weight < WEIGHTS[precision]


def table(found: dict[tuple, runs.Differences], presets: list[str]) -> str:
    """Returns markdown: for each layout and precision the largest difference of each preset, in
    gradients or (bf16) losses, and the largest difference of all presets in losses and weights."""
    lines = [
        f"| layout | precision | {' | '.join(presets)} | loss | weights |",
        f"|---|---|{'---|' * len(presets)}---|---|",
    ]
    for name, precision in dict.fromkeys((name, precision) for name, precision, _ in found):
        row = [found[name, precision, preset] for preset in presets]
        bf16 = precision == "bf16"
        cells = [f"{d.loss if bf16 else max(d.gradient, d.norm):.0e}" for d in row]
        cells.append(f"{max(d.loss for d in row):.0e}")
        cells.append("" if bf16 else f"{max(d.weight for d in row):.0e}")
        lines.append(f"| {name} | {precision} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(text: str) -> None:
    """Puts the table into its place in the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    how = (
        "Made by `python -m tests.distributed.matrix` on two CPU cores with gloo, torch "
        f"{torch.__version__}.\n\n"
    )
    PAGE.write_text(before + BEGIN + how + text + END + after)


def main() -> int:
    parser = argparse.ArgumentParser(description="Every preset in every layout against one process")
    parser.add_argument("--layouts", nargs="+", choices=list(ALL), default=list(ALL), metavar="L")
    presets = list(conftest.PRESETS)
    parser.add_argument("--presets", nargs="+", choices=presets, default=presets, metavar="P")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = conftest.tiny_raw(conftest.write_corpus(Path(folder)), Path(folder) / "cache")
        found = measure(raw, options.layouts, options.presets, options.precisions)
    text = table(found, options.presets)
    print(text)
    whole = options.layouts == list(ALL) and options.precisions == list(PRECISIONS)
    if whole and options.presets == presets:
        write(text)
    wrong = [key for key, largest in found.items() if not within(key[1], largest)]
    for key in wrong:
        rich.print(f"[red]{' '.join(key)} differs: {found[key]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
