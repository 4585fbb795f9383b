"""The report that a researcher reads at the end of a study: a pure function of `results.json`.

results ──> cells (seeds merged, ranked) ──> text, csv, latex, figures, page
        └─> warnings (what makes the comparison unfair or thin)
"""

from megaarch.report.figures import write_figures
from megaarch.report.page import write_page
from megaarch.report.plain_text import text
from megaarch.report.table_export import csv, latex

__all__ = ["csv", "latex", "text", "write_figures", "write_page"]
