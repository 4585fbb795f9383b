"""What the demo's committed results have to show, and that they are of the demo's configuration."""

import json
import math
from pathlib import Path

import pytest

from megaarch import config
from megaarch.evaluation.heldout_scores import Heldout
from megaarch.report.findings import unigram
from megaarch.report.headline import headline
from megaarch.report.yardsticks import CONTINUATION, told_apart
from megaarch.study.results import Results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ["bert", "unilm", "t5", "xlnet", "glm", "bart", "prefix_lm", "gpt"]


@pytest.fixture(scope="module")
def demo():
    return json.loads((BENCHMARKS / "2026-11-28-demo.json").read_text())


@pytest.fixture(scope="module")
def longer():
    return json.loads((BENCHMARKS / "2026-11-27-demo-t5-longer.json").read_text())


def misses(cell, results):
    """Which of the two yardsticks a cell does not pass: a unigram model of the same tokens in bits
    per byte, by a paired interval that leaves out zero where its items are kept; chance in the
    choice by more than two standard errors."""
    heldout, chance = cell["heldout"], results["chance"]
    error = math.sqrt(chance * (1 - chance) / heldout["items"]["choice"])
    below = heldout["continuation_bits_per_byte"] < results["unigram_bits_per_byte"]
    if below and "unigram_paired" in results:
        score = CONTINUATION.score([Heldout(**heldout)])
        [below] = told_apart([(score, unigram(Results.of(results)))])
    passed = {"bits": below, "choice": heldout["choice_accuracy"] > chance + 2 * error}
    return [name for name, fine in passed.items() if not fine]


def test_a_lead_that_may_be_the_documents_own_misses_the_unigram_model(demo):
    """0.016 bits per byte below it: on every item, and by half a bit on every second one."""
    cell = demo["cells"][NAMES.index("gpt")]
    own = cell["heldout"]["paired"]
    value = cell["heldout"]["continuation_bits_per_byte"] + 0.016
    for swing, missed in ((0.0, []), (0.5, ["bits"])):
        leads = [0.016 + (-1) ** i * swing for i in range(len(own["sizes"]))]
        lists = zip(own["amounts"], own["sizes"], leads, strict=True)
        costs = own | {"amounts": [amount + size * lead for amount, size, lead in lists]}
        results = demo | {"unigram_bits_per_byte": value, "unigram_paired": costs}
        assert misses(cell, results) == missed


def test_it_is_of_the_demos_configuration(demo):
    study = config.load_config("configs/demo.yaml").study
    assert [cell["name"] for cell in demo["cells"]] == NAMES == [c.name for c in study.cells]
    assert demo["budget"]["amounts"] == study.budgets
    rates = json.loads(Path(study.rates).read_text())["best"]
    assert {c["name"]: c["learning_rate"] for c in demo["cells"]} == {n: rates[n] for n in NAMES}


def test_all_cells_spend_the_same_and_learn(demo):
    budget = demo["budget"]["amounts"][0]
    for cell in demo["cells"]:
        assert cell["flops"] == pytest.approx(budget, rel=0.02), cell["name"]
        curve = [point["heldout"] for point in cell["curve"]]
        assert len(curve) >= 8 and curve[-1] < curve[1] < curve[0], cell["name"]
        assert cell["steps"] >= 300, cell["name"]


def test_seven_of_eight_cells_read_their_prefix_and_the_other_is_marked(demo):
    reads = {}
    for cell in demo["cells"]:
        low, high = cell["heldout"]["prefix_gain_interval"]
        reads[cell["name"]] = cell["heldout"]["reads_prefix"]
        assert reads[cell["name"]] == (low > 0) and high > low
    assert sum(reads.values()) >= 7
    [unread] = (name for name, read in reads.items() if not read)
    said = headline(Results.of(demo))
    assert said[0].startswith(f"{unread} may not read its input"), "before a winner"


def test_who_passes_the_yardsticks(demo):
    missing = {
        cell["name"]: misses(cell, demo)
        for cell in demo["cells"]
        if cell["heldout"]["comparable"] and misses(cell, demo)
    }
    assert not {"gpt", "prefix_lm"} & missing.keys()
    assert len(missing) <= 3 and all(len(missed) == 1 for missed in missing.values())


def test_t5_learns_to_choose_with_more_compute(longer):
    """On rows that run over documents' ends, at four and at sixteen times the demo's budget."""
    assert [cell["budget"] for cell in longer["cells"]] == [1.04e13, 4.16e13]
    assert [misses(cell, longer) for cell in longer["cells"]] == [[], []]
