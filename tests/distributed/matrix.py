"""The whole matrix: every preset in every layout against one process, in fp32 and fp64.

    python -m tests.distributed.matrix                 # all; writes the table of docs/parallelism.md
    python -m tests.distributed.matrix --layouts tp2 pp2 --presets gpt t5

It takes about a quarter of an hour on two idle cores. Exit code 1 where a run differs from one
process by more than 1e-5 in fp32 (weights after five steps of AdamW, epsilon 1e-6: 1e-4) or 1e-10
in fp64.
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
from tests.distributed.test_deepspeed import zero_runs

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
LIMITS = {"fp32": 1e-5, "fp64": 1e-10}
WEIGHTS = {"fp32": 1e-4, "fp64": 1e-10}
ALL = LAYOUTS | ZERO


def measure(raw: dict, layouts: list[str], presets: list[str]) -> dict[tuple, runs.Differences]:
    """(layout, precision, preset) -> the largest differences from one process."""
    pool, single, found = Pool(), {}, {}
    jobs = [(name, p) for name in layouts for p in LIMITS if not (name in ZERO and p == "fp64")]
    for name, precision in track(jobs, "layouts"):
        ranks, given, model = ALL[name]
        for preset in presets:
            key = (preset, precision, tuple(model.items()))
            if key not in single:
                single[key] = runs.run(raw, [preset], model, precision)[preset]
        if name in ZERO:
            answers = pool.run(ranks, zero_runs, raw, presets, model | given, timeout=3600)
        else:
            answers = pool.run(
                ranks, runs.run, raw, presets, model | given, precision, timeout=3600
            )
        for preset, run in runs.merge(answers).items():
            wanted = single[preset, precision, tuple(model.items())]
            found[name, precision, preset], _ = runs.differences(run, wanted)
    return found


def within(precision: str, largest: runs.Differences) -> bool:
    """Whether a run counts as equal."""
    values = asdict(largest)
    weight = values.pop("weight")
    return max(values.values()) < LIMITS[precision] and weight < WEIGHTS[precision]


def table(found: dict[tuple, runs.Differences], presets: list[str]) -> str:
    """Markdown: of each layout and precision the largest gradient difference of each preset, and
    the largest difference of losses and weights of all."""
    lines = [
        f"| layout | precision | {' | '.join(presets)} | loss | weights |",
        f"|---|---|{'---|' * len(presets)}---|---|",
    ]
    for name, precision in dict.fromkeys((name, precision) for name, precision, _ in found):
        row = [found[name, precision, preset] for preset in presets]
        cells = [f"{max(d.gradient, d.norm):.0e}" for d in row]
        cells += [f"{max(d.loss for d in row):.0e}", f"{max(d.weight for d in row):.0e}"]
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = conftest.tiny_raw(conftest.write_corpus(Path(folder)), Path(folder) / "cache")
        found = measure(raw, options.layouts, options.presets)
    text = table(found, options.presets)
    print(text)
    if options.layouts == list(ALL) and options.presets == presets:
        write(text)
    wrong = [key for key, largest in found.items() if not within(key[1], largest)]
    for key in wrong:
        rich.print(f"[red]{' '.join(key)} differs: {found[key]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
