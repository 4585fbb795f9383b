"""What the rules are given: the right cells of a study, and the right numbers of its probes."""

import pytest

from megaarch.probes import catalogue
from megaarch.probes.estimate import Estimate
from megaarch.report import yardsticks
from megaarch.report.arguments import figures
from megaarch.report.arguments.evidence import evidence
from megaarch.report.arguments.rules import FAILS, HOLDS, UNKNOWN
from megaarch.report.figures import write_figures
from megaarch.report.page import page
from megaarch.study.results import Results
from tests.report.arguments.example_probes import estimate, probed, results


def answers(found, probes) -> dict[int, str | None]:
    made = evidence(Results.of(found), probes)
    return {i: a.verdict and a.verdict.answer for i, a in enumerate(made, 1)}


def test_a_study_in_which_every_argument_holds():
    assert answers(results(), probed()) == dict.fromkeys(range(1, 8), HOLDS)


def test_without_probes_there_are_no_arguments():
    assert evidence(Results.of(results()), {}) == []


@pytest.mark.parametrize(
    ("number", "probe"),
    [
        (2, "rank"),
        (3, "difficulty"),
        (4, "regression"),
        (5, "position"),
        (6, "dialogue"),
        (7, "masks"),
    ],
)
def test_what_was_not_probed_has_no_verdict(number, probe):
    probes = probed()
    del probes[probe]
    assert answers(results(), probes) == dict.fromkeys(range(1, 8), HOLDS) | {number: None}


def test_a_probe_of_a_cell_that_was_run_anew_since_counts_for_nothing():
    """Their keys are the same where the settings changed that no key names."""
    found, probes = results(), probed()
    for cell in found["cells"]:
        cell["digest"] = f"{cell['name']} now"
    assert (
        answers(found, probes)[2] == HOLDS
    )  # a probe of an earlier version does not say what it saw
    ours = {name: f"{name}/base-1e+12" for name in probes["rank"].cells}
    probes["rank"].digests = {key: [f"{name} now"] for name, key in ours.items()}
    assert answers(found, probes)[2] == HOLDS
    probes["rank"].digests[ours["gpt"]] = ["gpt before"]
    assert answers(found, probes)[2] is None


def test_ranks_are_compared_over_as_many_tokens():
    """A prefix of 32 tokens is held against the causal decoder's 32, an encoder's 64 against its 64."""
    probes = probed()
    blocks = probes["rank"].cells["gpt"].blocks
    blocks["decoder.prefix"].trained.matrix.effective_rank = estimate(0.3)
    assert answers(results(), probes)[2] == FAILS  # of the prefix, 0.4


def test_seeds_of_a_cell_that_stands_in_several_pairs_count_once(monkeypatch):
    """Two encoders are held against the same causal attention."""
    probes = probed()
    causal = probes["rank"].cells["gpt"].blocks["decoder"].trained.matrix
    causal.effective_rank = Estimate(value=0.7, interval=[0.6, 0.8], seeds=[0.65, 0.75])
    pooled = []
    monkeypatch.setattr(yardsticks, "run_error", pooled.append)
    evidence(Results.of(results()), probes)
    [groups] = [groups for groups in pooled if [0.65, 0.75] in groups]
    assert groups.count([0.65, 0.75]) == 1
    assert (
        len(groups) == 5
    )  # the halves of the causal decoder and of the prefix decoder, and two encoders


def test_positions_are_read_off_the_second_layer():
    probes = probed()
    layers = probes["position"].cells["gpt-blind"].streams["decoder"].layers
    layers[2].of_chance = estimate(0.9)
    assert answers(results(), probes)[5] == FAILS
    layers[2].of_chance, layers[1].of_chance = estimate(0.1), estimate(0.9)
    assert answers(results(), probes)[5] == HOLDS


def test_a_dialogue_is_counted_under_masks_of_training():
    """Turn blocks would cost a prefix decoder as little as reuse costs gpt."""
    probes = probed()
    prefix = probes["dialogue"].cells["prefix"]
    prefix.flops["reuse"] = prefix.flops["turn_blocks"]
    assert answers(results(), probes)[6] == FAILS


def test_causal_cells_of_other_objectives_are_no_counterexample():
    found = results()
    another = dict(found["cells"][0]) | {"name": "causal-prefix", "objective": "prefix_lm"}
    another["heldout"] = dict(another["heldout"])
    found["cells"].append(another)
    probes = probed()
    better = probes["rank"].cells["gpt"].model_copy(deep=True)
    better.blocks["decoder.prefix"].trained.matrix.effective_rank = estimate(0.9)
    better.blocks["decoder"].lost_by_seeing_ahead = estimate(-0.5)
    probes["rank"].cells["causal-prefix"] = better
    given = answers(found, probes)
    assert (given[1], given[2]) == (HOLDS, HOLDS)


@pytest.mark.parametrize(
    ("number", "probe", "cell"),
    [(2, "rank", "encdec"), (3, "difficulty", "masked"), (5, "position", "masked-blind")],
)
def test_a_cell_that_is_still_to_be_probed_leaves_its_argument_open(number, probe, cell):
    probes = probed()
    del probes[probe].cells[cell]
    assert answers(results(), probes) == dict.fromkeys(range(1, 8), HOLDS) | {number: UNKNOWN}


def test_a_cell_without_tasks_leaves_the_first_argument_open():
    found = results()
    found["cells"][2]["heldout"]["tasks"] = {}
    assert answers(found, probed())[1] == UNKNOWN


def test_a_record_of_another_budget_is_not_read():
    probes = probed()
    rank = probes["rank"]
    rank.cells["gpt/base-1e+12"] = rank.cells["gpt"]
    rank.cells["gpt"] = rank.cells["gpt"].model_copy(deep=True)
    rank.cells["gpt"].blocks["decoder"].trained.matrix.effective_rank = estimate(0.01)
    assert answers(results(), probes)[2] == HOLDS


def test_cells_of_the_largest_decoder_s_size_are_judged():
    """A small encoder-decoder has more parameters than a decoder of the next size."""
    found = results()
    for cell in found["cells"]:
        cell |= {"size": "large", "parameters": 3_000_000}
    small = dict(found["cells"][2]) | {"name": "small", "size": "small", "parameters": 4_000_000}
    small |= {"key": "small/small-1e+12-seed0"}
    found["cells"].append(small)
    assert answers(found, probed()) == dict.fromkeys(range(1, 8), HOLDS)


def test_a_cell_that_trained_longer_is_no_counterexample():
    found = results()
    longer = dict(found["cells"][1]) | {"name": "longer", "parent": "prefix/base-1e+12-seed0"}
    longer |= {"key": "longer/base-1e+12-seed0", "inherited_flops": 1e12, "flops": 1e12}
    for cell in found["cells"]:
        cell["flops"] = 1e12
    found["cells"].append(longer)
    assert answers(found, probed()) == dict.fromkeys(range(1, 8), HOLDS)


def test_guessing_decides_nothing():
    found = results()
    for cell in found["cells"]:
        [task] = cell["heldout"]["tasks"].values()
        task["chance"] = 0.95
    assert answers(found, probed())[1] == UNKNOWN


def test_the_page_begins_with_the_question():
    with_arguments = page(Results.of(results()), probed())
    assert "<h1>Why decoder-only?</h1>" in with_arguments
    assert with_arguments.count('<b class="verdict holds">holds here</b>') == 7
    assert 'id="inference"' in with_arguments
    assert "<h1>Which architecture gives more?</h1>" in page(Results.of(results()))


def test_a_study_of_models_that_do_not_read_says_so_before_its_arguments():
    found = results()
    found["cells"][2]["heldout"]["reads_prefix"] = False
    made = page(Results.of(found), probed())
    before = made[: made.index('<ol class="arguments">')]
    assert "encdec may not read its input" in before
    assert "does not show" not in page(Results.of(results()), probed())


def test_the_error_of_regression_is_drawn_on_a_logarithmic_axis():
    """A model that diverges, and least squares with as many examples as unknowns, flatten any other."""
    probes = probed()
    learners = probes["regression"].cells["all"].learners
    learners["causal_decoder"].error["40"] = estimate(900.0)
    context = evidence(Results.of(results()), probes)[3]
    [axes] = context.panels[0].figure.axes
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log" and 0 < low < 0.1 and 900 < high < 2000
    names = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert names["causal decoder"] > 0.8 > 0.2 > names["least squares"]


def test_figures_of_the_arguments_are_written(tmp_path):
    written = {path.name for path in write_figures(results(), tmp_path, probed())}
    assert "inference-quality.svg" in written
    for each in evidence(Results.of(results()), probed()):
        assert {f"{p.name}.{kind}" for p in each.panels for kind in ("svg", "pdf")} <= written
    assert not any("argument" in path.name for path in write_figures(results(), tmp_path))


def test_probes_are_written_and_read(tmp_path):
    for each in probed().values():
        catalogue.write(tmp_path, each)
    read = catalogue.read(tmp_path)
    assert answers(results(), read) == dict.fromkeys(range(1, 8), HOLDS)
    assert page(Results.of(results()), read) == page(Results.of(results()), probed())


def test_a_learner_that_diverged_behind_many_examples_is_drawn_as_far_as_it_has_values():
    probes = probed()
    error = probes["regression"].cells["all"].learners["causal_decoder"].error
    last = max(error, key=int)
    error["1"] = Estimate(value=0.5, interval=[0.4, 0.6], items=8, seeds=[0.4, 0.5, 0.6])
    error[last] = Estimate(value=None)
    assert answers(results(), probes)[4] == UNKNOWN
    assert figures.by_seed(error) == [[(1, 0.4)], [(1, 0.5)], [(1, 0.6)]]


@pytest.mark.parametrize("name", ["causal_decoder", "prefix_decoder"])
def test_a_learner_without_a_value_leaves_its_argument_open_and_the_others_drawn(name):
    probes = probed()
    error = probes["regression"].cells["all"].learners[name].error
    error.update(dict.fromkeys(error, Estimate(value=None)))
    argument = evidence(Results.of(results()), probes)[3]
    assert argument.verdict.answer == UNKNOWN
    [axes] = argument.panels[0].figure.axes
    names = {text.get_text() for text in axes.texts}
    assert name.replace("_", " ") not in names and "encoder-decoder" in names
