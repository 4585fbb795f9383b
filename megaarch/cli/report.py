"""`megaarch report`: the report of a study, from its results."""

import argparse
from pathlib import Path

from megaarch.cli.options import Adder
from megaarch.errors import UserError


def add(command: Adder) -> None:
    report = command(
        "Write a study's report from its results.json",
        "Without an option it writes report.html into the study's folder.",
    )
    report.add_argument("run", metavar="RUN", help="a study's folder, with results.json in it")
    report.add_argument(
        "--gather",
        action="store_true",
        help="first make results.json of the cells that are finished (where each ran by itself)",
    )
    kind = report.add_mutually_exclusive_group()
    kind.add_argument("--text", action="store_true", help="print a table of 80 columns")
    kind.add_argument("--csv", action="store_true", help="print comma-separated values")
    kind.add_argument("--latex", action="store_true", help="print a LaTeX table (booktabs)")
    kind.add_argument("--figures", metavar="DIR", help="write each figure as PDF and SVG")


def run(options: argparse.Namespace) -> int:
    from megaarch import report
    from megaarch.probes import catalogue
    from megaarch.study import run_study
    from megaarch.study.folder import load_config
    from megaarch.study.results import Results

    path = Path(options.run) / "results.json"
    if options.gather:
        run_study.gather(load_config(path.parent), path.parent)
    try:
        results = Results.read(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: give the folder of a study that megaarch compare has run, or "
            "add --gather where its cells ran by themselves"
        ) from None
    if options.text:
        print(report.text(results))
    elif options.csv:
        print(report.csv(results), end="")
    elif options.latex:
        print(report.latex(results))
    else:
        probed, page = catalogue.read(path.parent), path.with_name("report.html")
        if options.figures:
            print(*report.write_figures(results, Path(options.figures), probed), sep="\n")
        else:
            report.write_page(results, page, probed)
            print(page)
    return 0
