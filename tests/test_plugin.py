"""A package outside (toy_plugin.py) adds an architecture with its objective, a kernel and an optimizer
by one entry point, and they train, score, draw and count as ours do, in every layout.

All runs in processes of their own, which find the package as they would find an installed one.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megaarch.config import registry
from megaarch.config.schema import Evaluation
from tests.distributed import runs
from tests.distributed.layouts import DEEPER, PP2, TP2
from tests.distributed.pool import Pool

HERE = Path(__file__).parent
EVALUATION = Evaluation(
    documents=6, curve_documents=4, prefix_tokens=12, continuation_tokens=6, choices=8, batch_rows=4
)
BRIEF = DEEPER | {"training.global_batch_size": 4, "training.steps": 3}


@pytest.fixture(scope="module")
def pool():
    return Pool()


def install(folder, name, source):
    """An installed package of one module, with its entry point."""
    (folder / f"{name}.py").write_text(source)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {name}\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder where the toy is installed, which other processes get from this one's path."""
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, "toy_plugin", (HERE / "toy_plugin.py").read_text())
    monkeypatch.syspath_prepend(folder)
    return folder


def work(raw, given):
    """Trains, scores, draws and counts the toy in this process's layout."""
    from megaarch.evaluation import yardsticks
    from megaarch.evaluation.items import cut
    from megaarch.evaluation.scorer import Scorer
    from megaarch.study import describe
    from megaarch.study.run_cell import masks

    found = runs.run(raw, ["blocks"], given)["blocks"]
    settings = runs.settings_of(raw, "blocks", given)
    trainer = runs.trainer_of(settings)
    prepared = runs._prepared(settings.data, settings.model.vocabulary_size)
    items = cut(prepared.heldout, prepared.tokenizer, EVALUATION)
    scorer = Scorer(trainer.engine, settings, prepared.tokenizer.vocabulary, 8)
    held = yardsticks.evaluate(scorer, items, EVALUATION)
    return found, held, masks(trainer), describe.describe(settings, "blocks")


def test_it_trains_scores_draws_and_counts_in_every_layout(installed, pool, raw):
    [(alone, held, masks, counted)] = pool.run(1, work, raw, BRIEF)
    for layout in (TP2, PP2):
        ranks = pool.run(2, work, raw, BRIEF | layout)
        found = runs.merge([{"blocks": rank[0]} for rank in ranks])["blocks"]
        runs.compare(found, alone, f"blocks {layout}", 1e-5)
        for _, other, drawn, again in ranks:
            assert other.continuation_bits_per_byte == pytest.approx(
                held.continuation_bits_per_byte, rel=1e-5
            )
            assert (drawn, again) == (masks, counted)
    assert alone.losses[-1] < alone.losses[0]
    assert held.comparable and held.middle_bits_per_byte is None
    [mask] = masks
    assert mask.parts == [[1, first, first + 4, 0, first + 4] for first in range(0, 48, 4)]
    # 2·n·L·(A + F) + 4·L·H·Dh·P + 2·targets·d·V forward, three times that in training (DESIGN 6)
    layers, width, rows, area = 3, 32, 48, sum(4 * (first + 4) for first in range(0, 48, 4))
    products = 2 * width * (32 + 16) + 3 * width * 48
    forward = 2 * rows * layers * products + 4 * layers * 32 * area + 2 * rows * width * 512
    assert counted.flops_per_row == 3 * forward
    assert counted.target_tokens_per_row == 48


def test_no_row_sees_what_it_predicts(installed, pool, raw):
    [seen] = pool.run(1, rows_seen, raw)
    for target, tokens in seen:
        assert target not in tokens


def rows_seen(raw):
    """(place of a target, places that its row is fed) of a row whose tokens are their own places."""
    from megaarch.attention.mask import Parts
    from megaarch.data.example import Example
    from megaarch.data.feature_converters import converter_of
    from megaarch.study.describe import made_up_vocabulary

    places = np.arange(30)
    example = Example(places[:5], places[5:])
    vocabulary = made_up_vocabulary(512, 16)
    made = converter_of("block_decoder")(example, vocabulary)
    (stream,) = made.streams
    sees = Parts.of([stream.parts], 30, 30).dense()[0]
    return [
        (int(target), stream.tokens[sees[row]].tolist())
        for row, target in zip(made.target_index, made.target_tokens, strict=True)
    ]


def losses(raw, given):
    return runs.run(raw, ["blocks"], given)["blocks"].losses


def test_its_kernel_and_its_optimizer_run_by_their_names(installed, pool, raw):
    own = {"model.attention": "dense", "training.optimizer": "momentum", "training.beta1": 0.0}
    ours = {"model.attention": "reference", "training.optimizer": "sgd"}
    given = BRIEF | {"training.learning_rate": 0.1}
    assert pool.run(1, losses, raw, given | own) == pool.run(1, losses, raw, given | ours)


def test_a_study_ranks_and_draws_it_beside_ours(installed, raw, tmp_path):
    study = copy.deepcopy(raw)
    del study["training"]["steps"]
    study["study"] = {
        "budgets": [3e8],
        "cells": [
            {"name": "gpt", "preset": "gpt"},
            {"name": "blocks", "preset": "blocks", "set": {"data.noise_density": 0.2}},
        ],
        "evaluation": EVALUATION.model_dump() | {"points": 1},
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    path = os.pathsep.join([str(installed), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "megaarch", "compare", str(file), "--output", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {cell["name"] for cell in results["cells"]} == {"gpt", "blocks"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mask-blocks" in page and "blocks of 4" in page
    assert re.search(r"--blocks: #123456; .*--blocks: #abcdef; ", page, re.DOTALL)
    assert page.count("var(--blocks)") > 3


def test_a_wrong_name_is_told_with_those_of_plugins(installed, pool, raw):
    [told] = pool.run(1, refused, raw, "blocs")
    assert "blocks, not 'blocs'; did you mean blocks?" in told


def refused(raw, preset):
    try:
        runs.settings_of(raw, preset, {})
    except ValueError as error:
        return str(error)


def test_a_plugin_that_cannot_be_loaded_is_named(tmp_path, monkeypatch, pool, raw):
    install(tmp_path, "broken", "import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    [told] = pool.run(1, refused, raw, None)
    assert told.startswith("the plugin broken (broken) cannot be loaded: No module named")


def test_names_that_are_taken_and_unknown_ones():
    table = registry.Registry("thing", json="json", path="os.path:join")
    assert table["json"] is json and table["path"] is os.path.join
    with pytest.raises(ValueError, match="the thing 'json' is registered already: choose another"):
        table.register(3, "json")
    table.register(3, "three")
    assert (table["three"], list(table), len(table)) == (3, ["json", "path", "three"], 3)
    with pytest.raises(ValueError, match=r"^no thing named 'jsn': .*; did you mean json\?$"):
        table["jsn"]
    assert "jsn" not in table and table.get("jsn") is None


IMPORT_ALL = """
import importlib, pathlib, megaarch
root = pathlib.Path(megaarch.__file__).parents[1]
for file in root.glob("megaarch/**/*.py"):
    if file.name != "__main__.py":
        importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))
from megaarch.config import registry
assert not registry._read
"""


def test_no_module_reads_a_table_when_it_is_imported():
    """A plugin that imports it would find it half made."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    subprocess.run([sys.executable, "-c", IMPORT_ALL], env=environment, check=True)
