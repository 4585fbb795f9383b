"""A study and a site that need no cluster."""

import copy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site_folder(tmp_path):
    """A folder with site.sh: nodes of two GPUs."""
    folder = tmp_path / "launch"
    folder.mkdir()
    text = (ROOT / "launch" / "site.example.sh").read_text()
    (folder / "site.sh").write_text(text.replace("GPUS_PER_NODE=8", "GPUS_PER_NODE=2"))
    return folder


@pytest.fixture
def study(raw):
    """Layouts of one, two and four processes; a child; two seeds."""
    mine = copy.deepcopy(raw)
    del mine["training"]["steps"]
    mine["training"]["micro_batch_size"] = 2
    mine["study"] = {
        "budgets": [6e8],
        "seeds": [0, 1],
        "cells": [
            {"name": "gpt", "preset": "gpt"},
            {"name": "t5", "preset": "t5", "set": {"parallel.pipeline_parallel": 2}},
            {
                "name": "glm",
                "preset": "glm",
                "set": {"parallel.tensor_parallel": 2, "parallel.data_parallel_shard": 2},
            },
            {"name": "adapted", "preset": "prefix_lm", "from": "gpt", "budget": 3e8},
        ],
    }
    return mine
