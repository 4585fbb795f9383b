"""The panel: who wins on what, who does not read, and that a study of equals names no winner."""

import re

import pytest

from megaarch import report
from megaarch.report import findings
from megaarch.report import headline as sentences
from megaarch.report.figures import sections
from megaarch.report.page import write_page
from megaarch.study.results import Results
from tests.study.example_results import (
    adapted_child,
    adapted_results,
    cell_at,
    example_cell,
    example_results,
    panel_results,
    scaling_results,
    with_lengths,
)


def headline(results):
    return sentences.headline(Results.of(results))


def tops(results):
    [finding] = findings.findings(Results.of(results))
    return {v.yardstick.key: [cell.label for cell in v.top] for v in finding.rankings}


def plain(name: str, value: float, **more) -> dict:
    cell = cell_at(name, value, value - 0.02, value + 0.02, **more)
    cell["heldout"] |= {"choice_accuracy": None, "choice_interval": None}
    return cell


def test_where_yardsticks_disagree_the_headline_names_who_wins_on_what():
    long_text = with_lengths(plain("a", 2.0), {"1": 3.0, "16": 2.0}, 0.2)
    one_word = with_lengths(plain("b", 2.3), {"1": 2.5, "16": 2.3}, 0.2)
    found = headline(example_results([long_text, one_word]))
    assert "no cell is best on every yardstick" in found[0]
    assert "Over whole continuations, a predicts held-out text best" in found[0]
    assert found[1] == "On continuations of 1 token b leads; on continuations of 16 tokens a leads."


def test_where_they_agree_one_cell_wins():
    best = with_lengths(plain("a", 2.0), {"1": 2.4, "16": 2.0}, 0.2)
    other = with_lengths(plain("b", 2.3), {"1": 2.6, "16": 2.3}, 0.2)
    found = headline(example_results([best, other]))
    assert "a predicts held-out text best" in found[0] and "no cell is best" not in found[0]
    assert found[1] == "On continuations of 1 and 16 tokens a leads."


def test_a_cell_that_does_not_read_its_prefix_is_said_first_and_marked(tmp_path):
    results = panel_results()
    found = headline(results)
    assert found[0].startswith("bart may not read its input")
    lines = report.text(results).splitlines()
    [row] = [line for line in lines if line.startswith("bart") and "!" in line]
    assert row.split()[-2:] == ["0.002", "-0.008!"]
    assert sum("!" in line for line in lines if line.startswith(("gpt", "t5", "glm"))) == 0
    assert max(map(len, lines)) <= 80
    page = write_page(results, tmp_path / "report.html").read_text()
    assert page.count('class="unread"') == 1


def test_several_seeds_read_their_prefix_only_if_their_spread_leaves_out_zero():
    gains = {"steady": (0.10, 0.11, 0.12), "lucky": (0.02, 0.01, 0.30)}
    cells = [
        with_lengths(plain(name, 2.0, seed=seed), {"1": 2.4, "16": 2.0}, gain, half=0.005)
        for name, each in gains.items()
        for seed, gain in enumerate(each)
    ]
    found = headline(example_results(cells))
    assert found[0].startswith("lucky may not read") and "steady" not in found[0]


def test_by_length_and_gain_are_drawn_for_comparable_cells():
    panels = {p.name: p for p in sections(Results.of(panel_results()))["heldout"]}
    assert {"heldout-length", "heldout-gain"} <= panels.keys()
    shown = " ".join(panels["heldout-gain"].groups.values())
    assert "bart: 0.000 at 1, 0.001 at 2" in shown and "bert" not in shown


def test_middles_judge_no_cell_that_is_told_their_length():
    found = tops(example_results())
    assert found["middle"][0] == "t5"  # xlnet, unilm and bert know how many tokens are missing
    assert not {"unilm", "bert", "xlnet"} & set(found["middle"])


def with_tasks(cell: dict, shares: dict[str, float]) -> dict:
    """The cell with 100 items of each task, of which it answers a share rightly."""
    cell["heldout"]["tasks"] = {
        name: {
            "accuracy": share,
            "interval": [share - 0.1, share + 0.1],
            "items": 100,
            "chance": 0.25,
            "right": [float(i < 100 * share) for i in range(100)],
        }
        for name, share in shares.items()
    }
    return cell


def test_finetuned_cells_are_ranked_by_tasks_and_never_by_raw_text(tmp_path):
    raw = with_tasks(cell_at("raw", 2.0, 1.9, 2.1), {"copa": 0.5})
    names = {"tuned": (1.0, 0.95), "mistuned": (0.5, 0.3)}
    tuned = [
        with_tasks(cell_at(name, bits, 0.0, 3.0, objective="supervised"), {"copa": share})
        for name, (bits, share) in names.items()
    ]
    results = example_results([raw, *tuned])
    found = headline(results)
    assert "raw predicts held-out text best" in found[0] and "no other comparable cell" in found[0]
    assert "Among finetuned cells, on the mean of the tasks and the task copa tuned leads." in found
    said = (
        "tuned and mistuned are finetuned on pairs of input and target, and ranked by tasks alone."
    )
    assert said in found
    lines = report.text(results).splitlines()
    apart = lines.index("finetuned: ranked by tasks alone")
    assert [line.split()[0] for line in lines[apart + 1 : apart + 3]] == ["tuned", "mistuned"]
    assert tops(results)["continuation"] == ["raw"] == tops(results)["tasks"]
    drawn = sections(Results.of(results))
    of_text = [set(panel.groups.values()) for panel in (*drawn["heldout"], *drawn["choice"])]
    assert of_text and not any("tuned: " in says for each in of_text for says in each)
    assert [panel.name for panel in drawn["tasks"]] == ["task-copa"]
    page = write_page(results, tmp_path / "report.html").read_text()
    table = page.partition('<table class="leads">')[2].partition("</table>")[0]
    words = " ".join(re.sub("<[^>]*>", " ", table).split())
    assert words.endswith("Finetuned cells the mean of the tasks and the task copa tuned")


def test_the_mean_of_tasks_is_a_yardstick_and_a_column(tmp_path):
    few = with_tasks(plain("few", 2.0), {"a": 0.3, "b": 0.4})
    many = with_tasks(plain("many", 2.3), {"a": 0.9, "b": 0.4})
    results = example_results([few, many])
    found = headline(results)
    assert "no cell is best on every yardstick" in found[0]
    assert "On the mean of the tasks and the task a many leads" in found[1]
    assert "on the task b no cell can be told from the best" in found[1]
    lines = report.text(results).splitlines()
    assert "mean accuracy of 2 tasks (chance 0.250)" in " ".join(lines)
    [row] = [line.split() for line in lines if line.startswith("many") and len(line.split()) == 4]
    assert row[1] == "0.650" and row[3] == "2"
    page = write_page(results, tmp_path / "with.html").read_text()
    assert ">Tasks</th>" in page and ">65%</td>" in page
    assert ">Tasks</th>" not in write_page(example_results(), tmp_path / "none.html").read_text()


@pytest.mark.parametrize("share", [0.1, 0.99])
def test_a_pseudo_likelihood_changes_no_sentence_about_the_others(share):
    """However many of the tasks' questions it answers, and whatever it spent."""
    few, many = (with_tasks(plain(n, x), {"a": y}) for n, x, y in (("f", 2, 0.3), ("m", 2.3, 0.9)))
    bert = with_tasks(example_cell("bert") | {"flops": 3.2e13}, {"a": share})
    without, found = (
        headline(example_results([few, many])),
        headline(example_results([few, many, bert])),
    )
    assert "no cell is best on every yardstick" in without[0]
    assert found == [*without, found[-1]] and found[-1].startswith("bert is scored by pseudo")


def test_a_pseudo_likelihood_s_accuracies_stand_apart():
    cells = [with_tasks(plain(n, 2.0), {"a": y}) for n, y in (("few", 0.3), ("many", 0.6))]
    results = example_results([with_tasks(example_cell("bert"), {"a": 0.99}), *cells])
    assert tops(results)["tasks"] == ["many"] == tops(results)["task a"]
    lines = report.text(results).splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if line.endswith("above")) + 2 :]
    assert [row.split()[0] for row in rows[:3]] == ["many", "few", "bert"]
    assert [row.endswith("*") for row in rows[:3]] == [False, False, True]
    [panel] = sections(Results.of(results))["tasks"]
    assert panel.caption.startswith("* Each token given both of its sides")


def test_of_the_tasks_their_mean_alone_denies_that_one_cell_is_best():
    """One cell predicts text better; thirty tasks on which both are equal lean to either by chance."""
    leaning = {f"t{i}": (0.3, 0.6) if i < 2 else (0.45, 0.43) for i in range(30)}
    best, other = (
        with_tasks(plain(name, bits), {task: shares[i] for task, shares in leaning.items()})
        for i, (name, bits) in enumerate((("best", 2.0), ("other", 2.3)))
    )
    found = headline(example_results([best, other]))
    assert "no cell is best" not in found[0]
    assert "on the tasks t0 and t1 other leads" in found[1].lower()


def test_tasks_held_out_whole_have_a_yardstick_and_a_column_of_their_own(tmp_path):
    """Of a finetuned cell and of the one it came from, by the same tasks."""
    shares = {"raw": {"a": 0.9, "b": 0.2, "c": 0.4}, "tuned": {"a": 0.9, "b": 0.9, "c": 0.5}}
    raw = with_tasks(plain("raw", 2.0), shares["raw"])
    tuned = with_tasks(cell_at("tuned", 2.0, 1.9, 2.1, objective="supervised"), shares["tuned"])
    other = with_tasks(cell_at("other", 2.0, 1.9, 2.1, objective="supervised"), shares["raw"])
    for cell in (tuned, other):
        cell["heldout"]["tasks"]["a"]["trained_on"] = True
    results = example_results([raw, tuned, other])
    assert "the mean of 2 tasks that none was trained on" in " ".join(headline(results))
    [finding] = findings.findings(Results.of(results))
    found = {v.yardstick.key: v for v in finding.of_finetuned}
    assert [cell.label for cell in found["tasks unseen"].top] == ["tuned"]
    titles = [panel.title for panel in sections(Results.of(results))["tasks"]]
    assert titles == ["a", "b (held out whole)", "c (held out whole)"]
    page = write_page(results, tmp_path / "whole.html").read_text()
    assert ">Unseen tasks</th>" in page and ">70%</td>" in page and ">30%</td>" in page
    rows = [line.split() for line in report.text(results).splitlines() if line.startswith("raw")]
    assert ["raw", "0.500", "0.300"] in [[row[0], row[1], row[4]] for row in rows if len(row) == 6]


def test_many_tasks_are_counted_in_the_headline():
    shares = {f"t{i}": 0.3 for i in range(6)}
    cells = [with_tasks(plain(name, 2.0 + i), shares) for i, name in enumerate("ab")]
    assert "the mean of the tasks and 6 tasks no cell can be told" in " ".join(
        headline(example_results(cells))
    )


def test_a_cell_that_trained_longer_from_another_s_weights_is_ranked_with_no_other(tmp_path):
    """On its parent's tokens and on its own; one that has what its parent left of the budget is ranked."""
    parent = cell_at("base", 2.5, 2.4, 2.6, budget=8e5, key="base", seen_tokens=8e5)
    child = cell_at("child", 2.0, 1.9, 2.1, budget=8e5, parent="base", seen_tokens=8e5)
    child["inherited_tokens"] = 2e5
    results = example_results([parent, child], "seen_tokens")
    found = headline(results)
    assert "800 k seen tokens each, base predicts held-out text best" in found[0]
    said = "child (1.00 M tokens in all) started from another cell's weights"
    assert f"{said}, and is ranked with no other." in found
    [finding] = findings.findings(Results.of(results))
    assert all(cell.label != "child" for v in finding.rankings for cell in v.order)
    lines = report.text(results).splitlines()
    assert lines[lines.index("trained longer, from other weights") + 1].startswith("child ")
    page = write_page(results, tmp_path / "report.html").read_text()
    assert "Trained longer, from other weights" in page
    child["seen_tokens"] = 6e5
    assert "800 k seen tokens each, child predicts" in headline(results)[0]


def test_one_that_starts_from_an_adapted_cell_counts_all_that_its_weights_have_had():
    results = adapted_results((0,))
    again = dict(next(c for c in results["cells"] if c["name"] == "gpt-adapted"))
    again |= {"name": "gpt-again", "parent": again["key"], "key": "gpt-again/base"}
    again["inherited_flops"] = 2 * again["inherited_flops"]
    results["cells"].append(again)
    _, adapted = findings.findings(Results.of(results))
    assert [cell.label for cell in findings.heirs(adapted.cells)] == ["gpt-again"]


def test_heirs_are_told_by_what_the_study_matches():
    """By target tokens, of which the objectives make unequal numbers of as many seen ones; and by seen tokens
    where parameters are matched."""
    full = cell_at("full", 2.5, 2.4, 2.6, key="full", seen_tokens=8e5, target_tokens=8e5)
    span = cell_at("span", 2.5, 2.4, 2.6, key="span", seen_tokens=5e6, target_tokens=8e5)
    child = cell_at("child", 2.0, 1.9, 2.1, parent="full", seen_tokens=8e5, target_tokens=8e5)
    child["inherited_tokens"] = 8e5
    assert heirs_of([full, span, child], "target_tokens") == ["child"]
    assert heirs_of([full, child], "parameters") == ["child"]
    assert heirs_of([full, span, child], "parameters") == []


def heirs_of(cells, match):
    results = Results.of(example_results(cells, match))
    return [cell.label for f in findings.findings(results) for cell in findings.heirs(f.cells)]


def test_where_parameters_are_matched_a_budget_is_of_tokens(tmp_path):
    cells = [cell_at(name, 2.0, 1.9, 2.1, budget=3e11, adaptation=None) for name in ("a", "b")]
    children = [cell | {"name": f"{cell['name']}-adapted", "adaptation": 6e9} for cell in cells]
    results = example_results([*cells, *children], "parameters")
    first, *_, second = [s for s in headline(results) if "predicts held-out text best" in s]
    assert first.startswith("At 300 B seen tokens each, ")
    assert second.startswith("After 6.00 B seen tokens more of adaptation each, ")
    page = write_page(results, tmp_path / "report.html").read_text()
    for shown in (page, report.text(results), report.latex(results)):
        assert "300 B seen tokens" in shown and "B parameters" not in shown


def test_names_that_hold_a_seed_s_word_are_whole_names():
    parent = cell_at("gpt-seeded", 2.5, 2.4, 2.6, key="gpt-seeded/base-seed0", seen_tokens=8e5)
    child = cell_at("gpt-seeded-long", 2.0, 1.9, 2.1, parent=parent["key"], seen_tokens=8e5)
    child |= {"key": "gpt-seeded-long/base-seed0", "inherited_tokens": 8e5}
    assert heirs_of([parent, child], "seen_tokens") == ["gpt-seeded-long"]


def test_finetuned_cells_that_trained_longer_lead_no_tasks(tmp_path):
    base = {"a": cell_at("a", 2.0, 1.9, 2.1, key="a/base"), "b": None}
    base["b"] = cell_at("b", 2.0, 1.9, 2.1, key="b/base", parent="a/base", inherited_flops=3e13)
    tuned = []
    for name, parent in (("a", "a/base"), ("b", "b/base"), ("c", "a/base")):
        inherited = 3e13 if parent == "a/base" else 6e13
        cell = cell_at(f"{name}-tuned", 2.0, 1.9, 2.1, objective="supervised", parent=parent)
        share = 0.95 if name == "b" else 0.4
        tuned.append(with_tasks(cell | {"inherited_flops": inherited}, {"t": share}))
    results = example_results([*base.values(), *tuned])
    [finding] = findings.findings(Results.of(results))
    assert [cell.label for cell in findings.heirs(finding.cells)] == ["b", "b-tuned"]
    assert finding.of_finetuned
    assert not any(c.label == "b-tuned" for v in finding.of_finetuned for c in v.order)
    assert "b-tuned (9" in " ".join(headline(results))


@pytest.mark.parametrize("match", ["flops", "parameters", "seen_tokens"])
def test_sizes_compare_at_equal_flops_alone(match):
    results = scaling_results()
    results["budget"]["match"] = match
    for cell in results["cells"]:
        cell["parameters"] = {"small": 1e6, "medium": 2e6, "large": 4e6}[cell["size"]]
    found = findings.findings(Results.of(results))
    groups = [[cell.label for cell in finding.main.order] for finding in found]
    if match == "flops":
        assert [len(group) for group in groups] == [9, 9]
        return
    sizes = ["large", "medium", "small"] * 2
    assert [{label.partition(" ")[2] for label in group} for group in groups] == [
        {s} for s in sizes
    ]
    said = headline(results)
    starts = [
        f"At size {size} and {finding.amount.partition(' and ')[2]} each, "
        for size, finding in zip(sizes, found, strict=True)
    ]
    assert [s for s in said if s.startswith("At size")] == [
        next(s for s in said if s.startswith(start)) for start in starts
    ]
    assert len({finding.amount for finding in found}) == 6


def lose(results, wanted, parent=None):
    """Takes cells out of results, as ones that diverged, or whose parent did."""
    gone = [cell for cell in results["cells"] if wanted(cell)]
    results["cells"] = [cell for cell in results["cells"] if not wanted(cell)]
    results.setdefault("diverged", []).extend(
        {key: cell.get(key) for key in ("name", "key", "size", "budget", "seed")}
        | {"key": "k", "divergence": {"said": "not finite", "step": 9, "parent": parent}}
        for cell in gone
    )
    return results


def test_the_headline_names_who_diverged_where_nothing_else_is_left():
    results = scaling_results()
    results["budget"]["match"] = "parameters"
    lose(results, lambda cell: cell["size"] == "large" and cell["budget"] == 3e13)
    said = " ".join(headline(results))
    names = [
        f"{name} large at 30.0 T seen tokens (at 3 of 3 seeds)"
        for name in ("gpt", "prefix_lm", "t5")
    ]
    assert (
        f"{names[0]}, {names[1]} and {names[2]} diverged in training, and rank with no other."
        in said
    )


def test_a_size_of_which_all_diverged_is_one_of_several():
    results = scaling_results()
    results["cells"] = [
        c for c in results["cells"] if c["size"] != "medium" and c["budget"] == 1e13
    ]
    lose(results, lambda cell: cell["size"] == "large")
    lose(results, lambda cell: cell["name"] == "gpt" and cell["seed"] == 1)
    lose(results, lambda cell: cell["name"] == "t5" and cell["seed"] == 2, "gpt")
    assert {cell.label for cell in findings.merged_cells(Results.of(results))} == {
        "gpt small",
        "prefix_lm small",
        "t5 small",
    }
    said = " ".join(headline(results))
    assert "gpt small (at 1 of 3 seeds) diverged" in said.replace(
        "t5 large (at 3 of 3 seeds) and ", ""
    )
    assert (
        "t5 small (at 1 of 3 seeds) was not run, for what it starts from diverged, and ranks"
        in said
    )
    [finding] = findings.findings(Results.of(results))
    assert [cell.label for cell in finding.main.order] == ["prefix_lm small"]


ADAPTED = ["t5-adapted", "gpt-adapted", "prefix_lm-adapted", "unilm-adapted", "bart-adapted"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_adapted_cells_are_ranked_among_themselves_beside_what_they_were(seeds, tmp_path):
    results = adapted_results(seeds)
    raw, adapted = findings.findings(Results.of(results))
    assert (raw.adaptation, adapted.adaptation) == (None, 6e12)
    assert [cell.label for cell in findings.ranked(adapted.cells)] == ADAPTED
    assert not {cell.label for cell in raw.cells} & set(ADAPTED)
    sentences = " ".join(headline(results))
    assert "After 6.00 \u00d7 10\u00b9\u00b2 training FLOPs more of adaptation each" in sentences
    assert "At equal compute (3.00 \u00d7 10\u00b9\u00b3 training FLOPs each)" in sentences
    cells = {cell["name"]: cell for cell in results["cells"] if cell["seed"] == 0}
    before, after = (cells[n]["heldout"]["continuation_bits_per_byte"] for n in ("t5", ADAPTED[0]))
    total = cells["t5"]["flops"] + 6e12
    [line] = [line for line in report.text(results).splitlines() if line.startswith("t5-adapted")]
    assert f"{before:.3f} -> {after:.3f}" in line and f"{total:.2e}".replace("+", "") in line
    tokens = (cells["t5"]["seen_tokens"] + cells[ADAPTED[0]]["seen_tokens"]) / 1e6
    assert line.endswith(f"{tokens:.2f} M")
    page = write_page(results, tmp_path / "report.html").read_text()
    section = page.partition('<section id="adaptation">')[2].partition("</section>")[0]
    assert f"{before:.3f} \u2192 {after:.3f}" in section
    assert "span corruption \u2192 prefix lm" in section
    drawn = [panel for panels in sections(Results.of(results)).values() for panel in panels]
    assert drawn and not any("adapted" in name for panel in drawn for name in panel.groups)


def test_a_report_without_adaptation_has_no_section_of_it(tmp_path):
    page = write_page(example_results(), tmp_path / "report.html").read_text()
    assert "adaptation" not in page


def test_a_pseudo_likelihood_is_marked_where_it_diverged_and_where_it_was_adapted(tmp_path):
    cells = [example_cell(name, seed=seed) for name in ("gpt", "bert") for seed in (0, 1)]
    of_seeds = lose(
        example_results(cells), lambda cell: (cell["name"], cell["seed"]) == ("bert", 1)
    )
    adapted = adapted_results()
    parent = next(cell for cell in adapted["cells"] if cell["name"] == "bert")
    adapted["cells"].append(adapted_child(parent, 6e12) | {"objective": "masked_lm"})
    for results, rows in ((of_seeds, 1), (adapted, 2)):
        lines = report.text(results).splitlines()
        marked = [line for line in lines if "* " in line and not line.startswith("* ")]
        assert len(marked) == rows and all(line.startswith("bert") for line in marked)
        assert any(line.startswith("* pseudo-likelihood") for line in lines)
        page = write_page(results, tmp_path / "report.html").read_text()
        assert page.count('<sup title="pseudo-likelihood') == rows


def test_a_cell_of_which_a_seed_diverged_is_not_held_against_the_unigram_model():
    results = example_results([example_cell(n, seed=s) for n in ("gpt", "t5") for s in (0, 1)])
    results["unigram_bits_per_byte"] = 2.0
    assert "t5 did worse" in " ".join(headline(results))
    lose(results, lambda cell: (cell["name"], cell["seed"]) == ("t5", 1))
    said = " ".join(headline(results))
    assert "every comparable cell beats it" in said and "t5 (at 1 of 2 seeds) diverged" in said
