"""`megaarch fit`: scaling laws of a study's architectures, or of anyone's points."""

import argparse
import json
from itertools import chain
from pathlib import Path

from megaarch.cli.options import Adder, check_ranges
from megaarch.errors import UserError

MOST = 100_000  # resamples


def add(command: Adder) -> None:
    fit = command(
        "Fit scaling laws to a study over sizes and budgets, or to points of a CSV file",
        "L(N, D) = E + A/N^alpha + B/D^beta for each architecture, with bootstrap intervals; which of "
        "two is better at which budget; isoFLOP curves where there are several sizes at a budget. Intervals of a "
        "study are over runs and held-out documents, of a file over its points alone.",
    )
    fit.add_argument(
        "study", metavar="STUDY", nargs="?", help="a study's folder, with results.json"
    )
    fit.add_argument(
        "--points",
        metavar="FILE.csv",
        help="columns parameters, loss, tokens or training_flops, and perhaps architecture",
    )
    fit.add_argument(
        "--leave-out",
        metavar="K",
        type=int,
        default=0,
        help="leave out the K points of the fewest tokens a parameter (0)",
    )
    fit.add_argument(
        "--resamples", metavar="N", type=int, default=1000, help="of the bootstrap (1000)"
    )
    fit.add_argument("--seed", metavar="N", type=int, default=0, help="of the bootstrap (0)")
    fit.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megaarch.scaling import display, law, points
    from megaarch.scaling.crossing import comparisons
    from megaarch.scaling.isoflop import isoflop
    from megaarch.study.results import Results

    if (options.study is None) == (options.points is None):
        raise UserError("give a study's folder, or --points FILE.csv")
    check_ranges(options, leave_out=(0, MOST), resamples=(2, MOST), seed=(0, 1 << 63))
    if options.points:
        found = points.read(Path(options.points))
    else:
        path = Path(options.study) / "results.json"
        if not path.exists():
            raise UserError(f"{path} does not exist: give the folder of a study that has run")
        found = points.of_study(Results.read(path))
    kept = {name: of.without_lowest_ratios(options.leave_out) for name, of in found.items()}
    fits, refused = {}, []
    for name, of in kept.items():
        try:
            fits[name] = law.fit(of, options.resamples, options.seed)
        except UserError as error:
            refused.append(str(error))
    if not fits:
        raise UserError("; ".join(refused))
    curves = {name: isoflop(kept[name], options.resamples, options.seed) for name in fits}
    pairs = comparisons(fits)
    for sentence in refused:
        Console(stderr=True, highlight=False, markup=False).print(sentence, soft_wrap=True)
    if not options.json:
        console = Console(highlight=False, markup=False)
        display.show(fits, curves, console)
        said = map(display.sentence, pairs), display.notes(fits, pairs), display.caveats(fits)
        for sentence in chain(*said):
            console.print(sentence, soft_wrap=True)
        return 0
    records = {name: display.record(fit, curves[name]) for name, fit in fits.items()}
    if len(kept) == 1:
        [out] = records.values()
    else:
        out = {"architectures": records, "comparisons": [display.comparison(p) for p in pairs]}
    print(json.dumps(out, indent=1))
    return 0
