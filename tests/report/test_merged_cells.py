"""Cells merged over seeds, ranked and told apart: what the report says must follow from the numbers."""

import copy
import math
from csv import DictReader
from io import StringIO

import numpy as np
import pytest

from megaarch import report
from megaarch.evaluation.confidence_intervals import ratio_interval
from megaarch.report import charts, findings, yardsticks
from megaarch.report import headline as sentences
from megaarch.report import merged_cells as module
from megaarch.report.warnings import warnings_for
from megaarch.study.results import CellResult, Results
from tests.study.example_results import cell_at, example_results, scaling_results


def headline(results):
    return sentences.headline(Results.of(results))


def merge(cells):
    return module.merge([CellResult(**cell) for cell in cells]).model_dump()


def merged_cells(results):
    return [cell.model_dump() for cell in module.merged_cells(Results.of(results))]


def distinguishable(*cells):
    """Cells of one seed, or lists of the seeds of a cell."""
    seeds = [cell if isinstance(cell, list) else [cell] for cell in cells]
    merged = [module.merge([CellResult(**cell) for cell in each]) for each in seeds]
    scores = [cell.heldout.score(yardsticks.CONTINUATION) for cell in merged]
    return yardsticks.told_apart([(scores[0], scores[1])]) == [True]


def points_of(cell, *names):
    return charts.points_of(module.merge([CellResult(**cell)]), *names)


@pytest.mark.parametrize(
    "interval, expected",
    [((2.2, 2.4), True), ((2.0, 2.4), False), ((2.1, 2.4), False), ((1.2, 1.8), True)],
)
def test_cells_are_distinguishable_iff_their_intervals_leave_a_gap(interval, expected):
    a = cell_at("a", 2.0, 1.9, 2.1)
    b = cell_at("b", sum(interval) / 2, *interval)
    assert distinguishable(a, b) is expected
    assert distinguishable(b, a) is expected


def test_without_an_interval_nothing_is_distinguishable():
    a, b = cell_at("a", 2.0, 1.9, 2.1), cell_at("b", 9.0, 8.9, 9.1)
    b["heldout"]["continuation_interval"] = None
    assert not distinguishable(a, b)
    b["heldout"]["continuation_interval"] = [8.9, 9.1]
    assert distinguishable(a, b)


def test_headline_names_the_best_and_says_not_distinguishable_iff_it_overlaps():
    apart = example_results([cell_at("b", 2.5, 2.45, 2.55), cell_at("a", 2.0, 1.9, 2.1)])
    expected = "a predicts held-out text best, with 2.000 bits per byte, 0.500 (20.0%) below b"
    assert expected in headline(apart)[0]
    assert "not distinguishable" not in headline(apart)[0]
    assert "2.500~" not in report.text(apart)
    tied = example_results([cell_at("b", 2.05, 1.95, 2.15), cell_at("a", 2.0, 1.9, 2.1)])
    assert "not distinguishable" in headline(tied)[0]
    assert "2.050~" in report.text(tied)


def test_headline_claims_equal_compute_only_where_it_was_spent():
    cells = [cell_at("b", 2.5, 2.4, 2.6, flops=3e13), cell_at("a", 2.0, 1.9, 2.1, flops=3e13)]
    assert headline(example_results(cells))[0].startswith("At equal compute")
    cells[0]["flops"] = 3.1e13
    assert "equal compute" not in headline(example_results(cells))[0]
    assert "equal compute" not in headline(example_results(cells, "seen_tokens"))[0]


def test_finetuned_cells_spend_more_than_those_that_they_are_not_ranked_with():
    raw = [cell_at(name, 2.0, 1.9, 2.1, flops=3e13) for name in ("a", "b")]
    tuned = [cell_at(f"{c['name']}-tuned", 2.0, 1.9, 2.1, flops=4e13) for c in raw]
    tuned = [cell | {"objective": "supervised"} for cell in tuned]
    results = example_results([*raw, *tuned])
    assert headline(results)[0].startswith("At equal compute")
    assert not any("Unequal compute" in w for w in warnings_for(Results.of(results)))
    tuned[0]["flops"] = 5e13
    said = [w for w in warnings_for(Results.of(results)) if "Unequal compute" in w]
    assert len(said) == 1 and "a-tuned spent 25.0% more FLOPs than b-tuned" in said[0]


def test_a_child_does_not_win_at_equal_compute_on_its_parents():
    """Twice the compute: its own budget, and that of the weights it starts from."""
    parent = cell_at("gpt", 2.5, 2.4, 2.6, flops=3e13, key="gpt/base", inherited_flops=0.0)
    child = cell_at("adapted", 2.0, 1.9, 2.1, flops=3e13, parent="gpt/base", inherited_flops=3e13)
    results = example_results([parent, child])
    assert "gpt predicts held-out text best" in headline(results)[0]
    assert "no other comparable cell" in headline(results)[0]
    said = "adapted (6.00 \u00d7 10\u00b9\u00b3 FLOPs in all) started from another cell's weights, "
    assert said + "and is ranked with no other." in headline(results)
    found = warnings_for(Results.of(results))
    assert not any("more FLOPs than" in w for w in found)
    assert any("starts from the weights of gpt/base, so 3.00" in w for w in found)
    rows = {line.split()[0]: line for line in report.text(results).splitlines() if line}
    assert "6.00e13" in rows["adapted"] and "3.00e13" in rows["gpt"]
    assert r"6.00 \times 10^{13}" in report.latex(results)
    assert r"adapted$^{\ddagger}$" in report.latex(results)
    line = {row["name"]: row for row in DictReader(StringIO(report.csv(results)))}["adapted"]
    assert float(line["flops"]) == float(line["inherited_flops"]) == 3e13
    curve = points_of(child, "curve", "flops", "heldout")
    assert curve[0][0] == 3e13 and curve[-1][0] == 3e13 + child["curve"][-1]["flops"]
    assert points_of(child, "curve", "seconds", "heldout")[0][0] == 0
    child |= {"flops": 1e13, "inherited_flops": 2e13}
    assert headline(results)[0].startswith("At equal compute")
    assert "adapted predicts held-out text best" in headline(results)[0]


def test_a_pseudo_likelihood_never_wins():
    results = example_results()  # bert's figure is the lowest of all
    assert "gpt predicts held-out text best" in headline(results)[0]
    lines = report.text(results).splitlines()
    apart = lines.index("not comparable: pseudo-likelihood")
    assert [line.split()[0] for line in lines[apart + 1 : apart + 2]] == ["bert"]


def test_headline_counts_who_misses_the_unigram_model():
    results = example_results()
    assert "every comparable cell beats it" in " ".join(headline(results))
    results["unigram_bits_per_byte"] = 2.1
    found = " ".join(headline(results))
    assert "t5 is not distinguishable from it" in found and "unilm and bart did worse." in found
    results["unigram_bits_per_byte"] = 1.5
    assert "bits per byte; no comparable cell beats it." in " ".join(headline(results))
    del results["unigram_bits_per_byte"]
    assert "unigram" not in " ".join(headline(results))


def scored(name: str, seed: int, costs, documents) -> dict:
    """A cell whose bits per byte of each item (of 100 bytes) are given."""
    mean = costs.mean()
    cell = cell_at(name, mean, mean - 0.1, mean + 0.1, seed=seed)
    lists = {"documents": documents, "sizes": np.full(len(costs), 100.0), "amounts": 100 * costs}
    cell["heldout"]["paired"] = {key: value.tolist() for key, value in lists.items()}
    return cell


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_cell_beats_the_unigram_model_by_more_than_chance_or_is_not_said_to(seeds):
    """Tied: better on average, by what the choice of documents may well have given it."""
    rng = np.random.default_rng(3)
    documents, hard = np.arange(64), rng.normal(3.0, 0.4, 64)
    noise = rng.normal(0, 0.3, 64)
    costs = {
        "better": hard - 0.1,  # own interval over the unigram's value: only pairing shows it
        "tied": hard - 0.03 + noise - noise.mean(),
        "worse": hard + 0.1,
    }
    cells = [
        scored(name, seed, cost + 0.001 * seed, documents)
        for name, cost in costs.items()
        for seed in range(seeds)
    ]
    results = example_results(cells)
    of_unigram = scored("unigram", 0, hard, documents)["heldout"]
    results["unigram_bits_per_byte"] = of_unigram["continuation_bits_per_byte"]
    results["unigram_paired"] = of_unigram["paired"]
    found = " ".join(headline(results))
    assert "; tied is not distinguishable from it; worse did worse." in found
    results["cells"] = cells[:seeds]
    assert "; every comparable cell beats it." in " ".join(headline(results))
    results["cells"] = cells[seeds : 2 * seeds]
    found = " ".join(headline(results))
    assert "; no comparable cell beats it; tied is not distinguishable from it." in found


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "of_documents, of_seeds", [(0.15, 0.004), (0.02, 0.05)], ids=["documents", "seeds"]
)
def test_equal_architectures_are_told_apart_in_about_one_study_of_twenty(
    of_documents, of_seeds, seeds
):
    """Two cells of equal mean over the population of documents and of seeds: which of them the 64
    documents suit better, and how seeds fall, is chance."""
    if seeds == 1 and of_seeds > of_documents:
        of_seeds = 0.0  # one seed cannot know; the report warns of it
    rng, number, studies = np.random.default_rng(1), 64, 120
    documents, wrong = np.arange(number), 0
    for _ in range(studies):
        hard = rng.normal(2.0, 0.4, number)
        pair = []
        for name in "ab":
            suits = hard + rng.normal(0, of_documents, number)
            drawn = rng.normal(0, of_seeds, seeds)
            runs = [suits + shift + rng.normal(0, 0.03, number) for shift in drawn]
            pair.append([scored(name, s, run, documents) for s, run in enumerate(runs)])
        wrong += distinguishable(*pair)
    assert wrong / studies < 0.12


def test_one_document_tells_nothing_apart():
    costs, one = np.random.default_rng(0).normal(2.0, 0.1, 40), np.zeros(40)
    pair = [scored(name, 0, costs + worse, one) for name, worse in (("a", 0.0), ("b", 0.5))]
    for cell in pair:
        cell["heldout"]["continuation_interval"] = ratio_interval(costs, one + 1, one)
    assert not distinguishable(*pair)


def test_what_two_runs_differ_by_in_rounding_alone_tells_nothing_apart():
    """Costs of items are kept in four digits, and values in all."""
    rng, documents = np.random.default_rng(0), np.arange(64)
    costs = rng.normal(0.5, 0.1, 64)
    a, b = (scored(name, 0, costs + 1e-9 * rng.normal(size=64), documents) for name in "ab")
    for cell in (a, b):
        paired = cell["heldout"]["paired"]
        paired["amounts"] = [round(amount, 4) for amount in paired["amounts"]]
    assert a["heldout"]["continuation_bits_per_byte"] != b["heldout"]["continuation_bits_per_byte"]
    assert not distinguishable(a, b)


def test_a_true_difference_shows_at_any_number_of_seeds():
    rng = np.random.default_rng(2)
    documents, hard = np.arange(64), rng.normal(2.0, 0.4, 64)
    for seeds in (1, 2, 5):
        a, b = (
            [scored(name, s, hard + gap + rng.normal(0, 0.03, 64), documents) for s in range(seeds)]
            for name, gap in (("a", 0.0), ("b", 0.1))
        )
        assert distinguishable(a, b)
        own = [merge(cell)["heldout"]["continuation_interval"] for cell in (a, b)]
        assert own[0][1] > own[1][0], "only pairing shows it"


def test_the_paired_amounts_of_all_seeds_are_joined():
    documents = np.arange(3)
    [merged] = merged_cells(
        example_results([scored("a", s, np.array([1.0, 2.0, 3.0]) + s, documents) for s in (0, 1)])
    )
    assert merged["heldout"]["paired"]["amounts"] == [150.0, 250.0, 350.0]
    other = [scored("a", s, np.array([1.0, 2.0]), np.arange(2) + s) for s in (0, 1)]
    assert merge(other)["heldout"]["paired"] is None


def test_an_interval_over_two_seeds_stays_within_what_can_be():
    pair = [cell_at("a", value, 0, 9, seed=seed) for seed, value in enumerate((1.0, 9.0))]
    for cell, right in zip(pair, (0.4, 0.9), strict=True):
        cell["heldout"]["choice_accuracy"] = right
    [merged] = merged_cells(example_results(pair))
    assert merged["heldout"]["choice_interval"] == [0.0, 1.0]
    low, high = merged["heldout"]["continuation_interval"]
    assert low == 0.0 and high > 30


def test_seeds_merge_into_one_row_whose_interval_holds_documents_and_seeds():
    cells = [cell_at("a", v, v - 0.3, v + 0.4, seed=seed) for seed, v in enumerate((1.9, 2.0, 2.1))]
    cells[1]["curve"] = copy.deepcopy(cells[0]["curve"])
    for point in cells[1]["curve"]:
        point["heldout"] += 0.3
    cells[2]["curve"] = cells[0]["curve"]
    [merged] = merged_cells(example_results(cells))
    assert merged["seeds"] == 3
    assert merged["heldout"]["continuation_bits_per_byte"] == pytest.approx(2.0)
    assert merged["heldout"]["interval_kind"] == (
        "bootstrap over documents and Student's t over seeds"
    )
    half = 4.3027 * 0.1 / math.sqrt(3)
    ends = [2 - math.hypot(0.3, half), 2 + math.hypot(0.4, half)]
    assert merged["heldout"]["continuation_interval"] == pytest.approx(ends, rel=1e-5)
    assert merged["curve"][-1]["heldout"] == pytest.approx(cells[0]["curve"][-1]["heldout"] + 0.1)


def test_a_seed_without_a_value_is_not_averaged_away():
    cells = [cell_at("a", 2.0, 0, 9, seed=0), cell_at("a", math.nan, 0, 9, seed=1)]
    [merged] = merged_cells(example_results(cells))
    assert merged["heldout"]["continuation_bits_per_byte"] is None
    assert "no comparable cell" in report.text(example_results(cells))


def points(values: dict, key: str) -> list[dict]:
    """A curve from {step: value}: ten FLOPs and two seconds a step."""
    return [
        {"step": step, "flops": 10.0 * step, "seconds": 2.0 * step, key: value}
        for step, value in values.items()
    ]


def test_curves_are_means_over_seeds_also_where_their_steps_differ():
    curves = [{0: 4.0, 10: 2.0}, {0: 6.0, 12: 3.0}]
    losses = [{1: 8.0, 5: 4.0, 10: 2.0}, {1: 8.0, 6: 3.0, 12: 1.0}]
    cells = [cell_at("a", 2.0, 1.9, 2.1, seed=seed) for seed in (0, 1)]
    for cell, curve, loss in zip(cells, curves, losses, strict=True):
        cell |= {"curve": points(curve, "heldout"), "losses": points(loss, "loss")}
    [merged] = merged_cells(example_results(cells))
    assert merged["curve"] == points(
        {0: 5.0, 11: 2.5}, "heldout"
    )  # at shares 0 and 1 of the budget
    assert [point["flops"] for point in merged["losses"]] == [10.0, 50.0, 100.0]
    other = [8.0, 4.0, 3 - 2 * 4 / 6]  # the second seed's, at those FLOPs
    wanted = [(a + b) / 2 for a, b in zip((8.0, 4.0, 2.0), other, strict=True)]
    assert [point["loss"] for point in merged["losses"]] == pytest.approx(wanted)
    cells[1]["curve"] = points({0: 6.0, 5: 3.5, 10: 3.0}, "heldout")  # an evaluation more
    [merged] = merged_cells(example_results(cells))
    assert merged["curve"] == points({0: 5.0, 10: 2.5}, "heldout")


def test_sizes_and_budgets_stay_apart():
    merged = merged_cells(scaling_results())
    assert len(merged) == 3 * 3 * 2
    assert {cell["label"] for cell in merged if cell["name"] == "t5"} == {
        "t5 small",
        "t5 medium",
        "t5 large",
    }


def test_a_size_is_named_though_the_cell_s_others_are_not_finished():
    found = scaling_results()
    small = [c for c in found["cells"] if c["name"] != "t5" or c["size"] == "small"]
    labels = {cell["label"] for cell in merged_cells(found | {"cells": small})}
    assert "t5 small" in labels and "t5" not in labels
    one = [c for c in found["cells"] if c["size"] == "small"]
    assert {cell["label"] for cell in merged_cells(found | {"cells": one})} == {
        *("gpt", "prefix_lm", "t5")
    }


def test_what_is_equal_in_all_seeds_stays_as_it_is():
    """Of an amount of adaptation too, by which cells rank together: one seed of a cell may not be finished."""
    more = {"learning_rate": 3e-3, "adaptation": 1.3e24}
    cells = [cell_at("a", 2.0, 1.9, 2.1, seed=seed, **more) for seed in range(3)]
    cells += [cell_at("b", 2.3, 2.2, 2.4, seed=0, **more)]
    merged = merged_cells(example_results(cells))
    assert [cell["learning_rate"] for cell in merged] == [3e-3, 3e-3]
    [finding] = findings.findings(Results.of(example_results(cells)))
    assert [cell.label for cell in finding.cells] == ["a", "b"]


@pytest.mark.parametrize("gains", [(None, 0.2), (0.2, None), (None, -0.2), (-0.2, None)])
def test_seeds_of_which_one_has_no_gain_do_not_say_whether_a_cell_reads(gains):
    seeds = [cell_at("a", 2.0, 1.9, 2.1) | {"seed": seed} for seed in (1, 2)]
    for cell, gain in zip(seeds, gains, strict=True):
        cell["heldout"]["prefix_gain"] = gain
        cell["heldout"]["prefix_gain_interval"] = gain and [gain - 0.01, gain + 0.01]
        cell["heldout"]["reads_prefix"] = None if gain is None else gain > 0
    assert merge(seeds)["heldout"]["reads_prefix"] is None
