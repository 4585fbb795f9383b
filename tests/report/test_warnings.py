"""Each warning appears with its cause, and with nothing else."""

import pytest

from megaarch import report
from megaarch.report import flops_shares, notation, warnings
from megaarch.report.page import page
from megaarch.study.results import CellResult, Results
from tests.study.example_results import (
    clean_results,
    example_cell,
    example_results,
    scaling_results,
)


def warnings_for(results):
    return warnings.warnings_for(Results.of(results))


def warnings_of(cell):
    return warnings.warnings_of(CellResult(**cell))


def change(**values):
    def apply(cell):
        cell.update(values)

    return apply


def items(kind, number):
    return lambda cell: cell["heldout"]["items"].update({kind: number})


def of_documents(number):
    """Two items of each."""
    documents = [float(i // 2) for i in range(2 * number)]
    lists = {"documents": documents, "sizes": [100.0] * len(documents)}
    return lambda cell: cell["heldout"].update(paired=lists | {"amounts": [200.0] * len(documents)})


def setting(section, key, value):
    return lambda cell: cell["settings"][section].update({key: value})


def short_documents(cell, mean):
    """Trained by span corruption, in rows of 128 tokens, on documents of so many in the mean."""
    cell |= {"objective": "span_corruption"}
    cell |= {"data": {"train_documents": 10, "train_tokens": 10 * mean}}
    cell["settings"]["data"]["document_masks"] = True


CAUSES = [
    (change(flops=3.1e13), "Unequal compute"),
    (
        change(parameters=4_093_000),
        "Unequal parameters, for the study matches training FLOPs: unilm",
    ),
    (change(seen_tokens=588 * 5300), "unilm sees 5,300 tokens a step in 588 steps and"),
    (change(target_tokens=600_000), "Unequal targets at"),
    (setting("model", "vocabulary_size", 60_000), "Unequal heads at"),
    (change(tuned=False), "not tuned for unilm"),
    (change(learning_rate_at_edge=True), "edge of its grid for unilm"),
    (change(trial_flops=1.4e13), "tuned at a share of the compute: unilm (0.47)"),
    (
        change(skipped_steps=3),
        "Steps skipped, for their loss or gradient was not finite: unilm (3 of 588)",
    ),
    (change(padding_share=0.051), "More than 5% padding: unilm"),
    (change(truncated_share=0.2), "left out: unilm (20%)"),
    (
        lambda cell: short_documents(cell, 400),
        "Rows of span corruption that end a document, in their last span: unilm (about 32%)",
    ),
    (change(epochs=1.01), "More than one epoch over the training text: unilm"),
    (change(seed=1), "2 seeds in some cells"),
    (items("continuation", 99), "Only 99 held-out continuation items"),
    (items("choice", 20), "Only 20 held-out choice items"),
    (of_documents(19), "Items of only 19 held-out documents: intervals over so few"),
    (of_documents(1), "Items of only one held-out document: what holds for others"),
    (
        lambda cell: cell["heldout"].update(
            tasks={
                name: {"accuracy": 0.5, "by_shots": {"0": {"accuracy": 0.5}, "4": four}}
                for name, share in (("a", 0.5), ("b", 1.0))
                for four in [{"accuracy": 0.5, "shortened": share}]
            }
        ),
        "Prompts of tasks shortened to what training rows hold: 75.0% with 4 examples.",
    ),
    (setting("data", "source", "other.txt"), "Cells differ in data"),
    (setting("data", "tokenizer", "other.model"), "Cells differ in tokenizer"),
    (change(precision="bf16"), "Cells differ in precision"),
    (
        lambda cell: cell["settings"].update({"parallel": {"tensor_parallel": 2}}),
        "Cells differ in number of processes, so their speeds do not compare",
    ),
    (change(parent="gpt"), "starts from the weights of gpt"),
]


def test_a_fair_study_has_no_warning():
    assert warnings_for(clean_results()) == []
    assert "Read with care" not in report.text(clean_results())
    assert "Read with care" not in page(Results.of(clean_results()))


@pytest.mark.parametrize("cause, sentence", CAUSES, ids=[sentence for _, sentence in CAUSES])
def test_each_cause_gives_its_warning_and_no_other(cause, sentence):
    results = clean_results()
    cause(results["cells"][-1])  # unilm, seed 2
    found = warnings_for(results)
    assert len(found) == 1
    assert sentence in found[0]
    assert " ".join(sentence.split()[:3]) in report.text(results)


@pytest.mark.parametrize("what", ["threads", "lanes"])
def test_a_different_share_of_the_machine_is_said(what):
    """A cell that ran with a machine to itself is faster than those that shared it."""
    results = clean_results()
    for cell in results["cells"]:
        cell["environment"] = {"threads": 1, "lanes": 2}
    assert warnings_for(results) == []
    results["cells"][-1]["environment"] = {"threads": 1, "lanes": 2} | {what: 4}
    [warning] = warnings_for(results)
    assert warning.startswith("Cells differ in threads, or in how many cells ran side by side")
    assert "their speeds do not compare" in warning


@pytest.mark.parametrize("what", ["commit", "hardware", "versions", "tokenizer"])
def test_a_different_environment_is_said(what):
    results = clean_results()
    given = {
        "hardware": lambda value: {"cpu": value},
        "versions": lambda value: {"torch": value},
    }.get(what, str)
    for cell in results["cells"]:
        cell["environment"] = {what: given("a")}
    assert warnings_for(results) == []
    results["cells"][0]["environment"] = {what: given("b")}
    [warning] = warnings_for(results)
    assert warning.startswith(f"Cells differ in {what}: gpt; ")


def test_flops_within_two_percent_and_at_other_budgets_are_equal():
    results = clean_results()
    for cell in results["cells"]:
        cell["flops"] = 3e13
    results["cells"][0]["flops"] = 3.059e13
    assert warnings_for(results) == []
    for cell in results["cells"][:3]:
        cell |= {"budget": 6e13, "flops": 6e13}
    assert warnings_for(results) == []


@pytest.mark.parametrize("match, limit", [("flops", 1.1), ("parameters", 1.02)])
def test_parameters_within_a_limit_and_of_other_sizes_are_equal(match, limit):
    cells = [
        example_cell(preset, seed=seed, size=size) | {"target_tokens": 1_000_000}
        for size in ("small", "large")
        for preset in ("gpt", "unilm")
        for seed in (0, 1, 2)
    ]
    results = example_results(cells, match)
    largest = [cell for cell in cells if cell["name"] == "unilm" and cell["size"] == "large"]
    for cell in largest:
        cell["parameters"] *= limit - 0.001
    assert not [said for said in warnings_for(results) if "Unequal parameters" in said]
    for cell in largest:
        cell["parameters"] *= limit + 0.001
    [said] = [said for said in warnings_for(results) if "Unequal parameters" in said]
    assert "unilm large has " in said and " than gpt large with 7.07 M." in said


def test_an_encoder_decoder_s_parameters_are_said_once_however_many_groups_rank():
    results = clean_results()
    for cell in results["cells"][3:]:
        cell |= {"name": "t5", "architecture": "encoder_decoder", "parameters": 7_440_000}
    tuned = [
        cell | {"name": f"{cell['name']}-tuned", "objective": "supervised"}
        for cell in results["cells"]
    ]
    results["cells"] += tuned
    [said] = warnings_for(results)
    assert "t5 has 7.44 M, 100% more than gpt with 3.72 M. An encoder-decoder passes" in said


def test_what_follows_from_the_size_is_held_against_cells_of_the_same_size():
    """One architecture at three sizes predicts all that it sees at each; t5 less than gpt of its size."""
    unequal = ("Unequal targets", "Unequal heads", "Unequal last layers")
    results = scaling_results()
    every = results["cells"]
    results["cells"] = [cell for cell in every if cell["name"] == "gpt"]
    assert not [said for said in warnings_for(results) if said.startswith(unequal)]
    results["cells"] = [cell for cell in every if cell["name"] != "prefix_lm"]
    told = [said for said in warnings_for(results) if said.startswith("Unequal targets")]
    assert len(told) == 6
    for size in ("small", "medium", "large"):
        assert sum(f"gpt {size} predicts " in s and f"and t5 {size} " in s for s in told) == 2


def test_a_cause_is_told_in_its_least_and_its_greatest_degree():
    """Of a cell at several budgets, and in several words."""
    results = clean_results()
    for cell, epochs, share in zip(
        results["cells"][:3], (12.3, 1.04, 4.0), (0.2, 0.06, 0.1), strict=True
    ):
        cell |= {"epochs": epochs, "padding_share": share, "flops": 3e13}
        cell["extrapolation"] = {"places": 6, "scatter": 1.1, "times": epochs}
        cell["tuned"] = False
    found = " ".join(warnings_for(results))
    assert "More than one epoch over the training text: gpt (1.0 to 12.3)." in found
    assert "More than 5% padding: gpt (6.0% to 20%)." in found
    assert "for 12 times their parameters; swept at 6 sizes" in found


def test_degrees_above_a_thousand_are_ordered_as_numbers():
    degrees = ["1,200 of 5,000", "7 of 600", "about 90 of 600"]
    assert notation.extent(degrees) == "7 of 600 to 1,200 of 5,000"


def test_documents_that_are_long_or_cut_by_no_mask_or_of_another_objective_end_few_rows():
    for change_more in (
        lambda cell: short_documents(cell, 513),
        lambda cell: cell["settings"]["data"].update(document_masks=False),
        change(objective="full_lm"),
    ):
        results = clean_results()
        cell = results["cells"][-1]
        short_documents(cell, 400)
        assert len(warnings_for(results)) == 1
        change_more(cell)
        assert warnings_for(results) == []


def test_items_of_enough_documents_are_enough():
    results = clean_results()
    of_documents(20)(results["cells"][-1])
    assert warnings_for(results) == []


def test_batches_within_a_quarter_and_at_other_budgets_are_equal():
    results = clean_results()
    for cell in results["cells"]:
        cell |= {"steps": 100, "seen_tokens": 100_000}
    results["cells"][0]["seen_tokens"] = 124_000
    assert warnings_for(results) == []
    for cell in results["cells"][:3]:
        cell |= {"budget": 6e13, "flops": 6e13, "seen_tokens": 200_000}
    assert warnings_for(results) == []


def test_warnings_already_stored_are_not_said_twice():
    results = example_results()
    found = warnings_for(results)
    results["warnings"] = found
    assert warnings_for(results) == found
    assert any("its best learning rate" in w for w in warnings_of(example_cell("glm")))


def test_the_share_of_the_head_is_that_of_the_output_product():
    cell = CellResult(**clean_results()["cells"][0])
    sizes = cell.settings["model"]
    multiply_adds = cell.target_tokens * sizes["hidden_size"] * sizes["vocabulary_size"]
    assert flops_shares.head_share(cell) == pytest.approx(6 * multiply_adds / cell.flops)


def test_outputs_that_no_target_reads_are_told():
    """Of a gated layer of 192, heads of 48: the output product and three of the feed-forward, for each token that
    is no target; none where all are, and none behind an encoder."""
    results = clean_results()
    for cell in results["cells"]:
        cell["settings"]["model"]["activation"] = "swiglu"
        cell["target_tokens"] = cell["seen_tokens"] = 2_000_000
    assert warnings_for(results) == []
    cell = results["cells"][-1]
    cell["seen_tokens"] = 2_400_000
    share = 6 * 400_000 * (192 * 192 + 3 * 192 * 512) / cell["flops"]
    assert flops_shares.unread_share(CellResult(**cell)) == pytest.approx(share)
    [warning] = warnings_for(results)
    assert warning.startswith("Unequal last layers at ")
    assert f"{100 * share:.1f}% of the FLOPs of unilm and 0" in warning
    cell["architecture"] = "encoder_decoder"
    assert flops_shares.unread_share(CellResult(**cell)) == 0
    cell["architecture"] = "causal_decoder"
    cell["settings"]["model"]["activation"] = "of another version"
    assert flops_shares.unread_share(CellResult(**cell)) is None
    assert warnings_for(results) == []
