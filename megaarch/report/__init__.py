"""What a researcher sees at the end of a study: a pure function of `results.json`.

results ──> cells (seeds merged, ranked) ──> text, csv, latex, figures, page
        └─> warnings (what makes the comparison unfair or thin)
"""

from megaarch.report.cells import check, distinguishable
from megaarch.report.figures import write_figures
from megaarch.report.page import write_page
from megaarch.report.tables import csv, latex
from megaarch.report.text import text
from megaarch.report.warnings import warnings_for, warnings_of

__all__ = [
    "check",
    "csv",
    "distinguishable",
    "latex",
    "text",
    "warnings_for",
    "warnings_of",
    "write_figures",
    "write_page",
]
