"""A study of tiny cells, for tests that run it."""

import copy

from megaarch.study import distributed_cell

EVALUATION = {
    "points": 2,
    "documents": 6,
    "curve_documents": 4,
    "prefix_tokens": 12,
    "continuation_tokens": 6,
    "choices": 8,
    "middles": 4,
}


def small_study(raw, cells, budget=1.2e9, **more):
    """Returns the tests' configuration as a study of these cells. more: keys of `study`."""
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    given = {"name": "s", "budgets": [budget], "cells": cells, "evaluation": dict(EVALUATION)}
    mine["study"] = given | more
    return mine


def run_cells(raw, directory, names):
    """Runs these cells on this rank; whether each gave it a record."""
    return [distributed_cell.run_cell(raw, directory, name) is not None for name in names]
