"""The grid: what multiplies, what a cell is called, and what decides that it has changed."""

from types import SimpleNamespace

import pytest

from megaarch import config
from megaarch.config.fingerprint import changed_settings, fingerprint
from megaarch.model.parameter_count import parameter_count
from megaarch.study import costs, sweep
from megaarch.study.cells import expand, not_adapted, study_of
from megaarch.study.folder import StudyFolder
from megaarch.study.sweep_grid import RATE, SHARE
from tests.study.small_study import small_study


@pytest.fixture
def study(raw):
    cells = [{"name": "gpt", "preset": "gpt"}, {"name": "t5", "preset": "t5"}]
    return small_study(raw, cells, 1e9)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"input": "why?", "target": "so."}\n' * 20)
    return str(path)


def test_sizes_budgets_and_seeds_multiply_and_keys_stay(study, tmp_path):
    before = [cell.key for cell in expand(study, tmp_path)]
    assert before == ["gpt/base-1e+09-seed0", "t5/base-1e+09-seed0"]
    study["study"] |= {"budgets": [1e9, 2e9], "seeds": [0, 1]}
    after = [cell.key for cell in expand(study, tmp_path)]
    assert len(set(after)) == 8 and set(before) < set(after)
    study["study"]["sizes"] = [{"name": "a", "layers": 1}, {"name": "b", "hidden_size": 64}]
    sized = expand(study, tmp_path)
    assert len({cell.key for cell in sized}) == 16
    assert {(c.settings.model.layers, c.settings.model.hidden_size) for c in sized} == {
        (1, 32),
        (2, 64),
    }


def test_a_cell_resolves_to_settings_of_its_own(study, tmp_path):
    study["study"]["cells"][0]["set"] = {"model.kv_heads": 4, "training.learning_rate": 0.5}
    gpt, t5 = expand(study, tmp_path, {"gpt": {RATE: 0.1}, "t5": {RATE: 0.2}})
    assert (gpt.settings.model.architecture, t5.settings.model.architecture) == (
        "causal_decoder",
        "encoder_decoder",
    )
    assert gpt.settings.training.learning_rate == 0.5  # the cell's own word is last
    assert t5.settings.training.learning_rate == 0.2
    assert gpt.settings.training.budget.amount == 1e9
    assert gpt.settings.logging.directory == str(tmp_path / "cells" / gpt.key)


def test_a_cells_mapping_leaves_the_rest_of_its_section(study, tmp_path):
    study["study"]["cells"][0]["set"] = {"model": {"kv_heads": 4}}
    model = expand(study, tmp_path)[0].settings.model
    assert (model.kv_heads, model.hidden_size, model.preset) == (4, 32, "gpt")


def test_cells_share_a_vocabulary_or_a_tokenizer_file_and_so_their_items(study, prepared, tmp_path):
    """A tokenizer trained to another size cuts other items, which no two cells may be compared on."""
    study["study"]["cells"][1]["set"] = {"model": {"vocabulary_size": 600}}
    with pytest.raises(config.ConfigError) as told:
        expand(study, tmp_path)
    [problem] = told.value.problems
    assert problem.startswith("study.cells.1.set: model.vocabulary_size is the study's to set")
    study["data"]["tokenizer"] = str(prepared.tokenizer.path)
    gpt, t5 = expand(study, tmp_path)
    assert (gpt.settings.model.vocabulary_size, t5.settings.model.vocabulary_size) == (512, 600)
    study["study"]["evaluation"] = {"prefix_tokens": 12, "continuation_tokens": 6}
    opened = StudyFolder.open(study, tmp_path)
    items = [
        [
            (item.left.tolist(), item.span.tolist(), item.right.tolist(), item.span_bytes)
            for item in opened.held_out(cell.settings.model.vocabulary_size)["test"]
        ]
        for cell in (gpt, t5)
    ]
    assert items[0] == items[1] != []


def test_a_child_starts_from_its_parents_weights_with_a_budget_of_its_own(study, tmp_path):
    study["study"]["cells"].append(
        {"name": "adapted", "preset": "prefix_lm", "from": "gpt", "budget": 5e8}
    )
    parent, _, child = expand(study, tmp_path)
    assert child.parent == parent.key
    assert child.settings.training.start_from == parent.settings.logging.directory
    assert child.settings.training.budget.amount == 5e8


def test_a_rate_is_not_swept_for_a_cell_that_takes_its_parents_optimizer_along(study, tmp_path):
    along = {
        "name": "on",
        "preset": "gpt",
        "from": "gpt",
        "set": {"training.start_optimizer": True},
    }
    study["study"] |= {"cells": [*study["study"]["cells"], along], "budgets": [1e9]}
    assert expand(study, tmp_path)[2].settings.training.budget.amount == 2e9
    study["study"]["tune"] = {"learning_rates": [1e-3]}
    with pytest.raises(config.ConfigError, match="cells.2.set: a cell that takes its parent's opt"):
        expand(study, tmp_path)


@pytest.mark.parametrize("given", [{RATE: 5e-3}, {"training": {"learning_rate": 5e-3}}])
def test_no_trial_is_made_of_a_rate_that_a_cell_gives_itself(study, tmp_path, given):
    cells = [{**cell, "set": given} for cell in study["study"]["cells"]]
    study["study"] |= {"cells": [*cells, {"name": "swept", "preset": "gpt"}], "seeds": [0, 1]}
    study["study"] |= {"budgets": [1e9], "tune": {"learning_rates": [1e-3, 2e-3]}}

    def tried():
        cells = expand(study, tmp_path)
        trials = sweep.trials(study, tmp_path, cells)
        assert len(trials) == sum(costs.trials(cell, study_of(study)) for cell in cells)
        return [(t.name, t.seed, t.choice, t.settings.training.learning_rate) for t in trials]

    swept = [("swept", 0, {RATE: rate}, rate) for rate in (1e-3, 2e-3)]
    assert tried() == swept
    study["study"]["tune"]["encoder_shares"] = [0.25, 0.5]  # which that rate does not decide
    shares = [("t5", 0, {RATE: 5e-3, SHARE: share}, 5e-3) for share in (0.25, 0.5)]
    assert tried() == [*shares, *swept]


@pytest.mark.parametrize("match", ["flops", "seen_tokens", "target_tokens", "parameters"])
def test_every_way_to_match(study, tmp_path, match):
    study["study"]["match"] = match
    study["model"] |= {"layers": 8, "hidden_size": 64}
    gpt, t5 = expand(study, tmp_path)
    kind = "seen_tokens" if match == "parameters" else match
    assert {c.settings.training.budget.match for c in (gpt, t5)} == {kind}
    ratio = parameter_count(t5.settings.model) / parameter_count(gpt.settings.model)
    if match == "parameters":
        assert abs(ratio - 1) < 0.06
    else:
        assert ratio > 1.5


@pytest.mark.parametrize("stack", ["encoder_layers", "decoder_layers"])
def test_matching_parameters_keeps_the_stacks_that_are_given(study, tmp_path, stack):
    study["study"]["match"] = "parameters"
    study["model"]["layers"] = 8
    study["study"]["cells"][1]["set"] = {f"model.{stack}": 2}
    model = expand(study, tmp_path)[1].settings.model
    other = {"encoder_layers", "decoder_layers"} - {stack}
    assert getattr(model, stack) == 2 and getattr(model, other.pop()) is None


def test_a_change_that_matters_is_named_and_one_that_does_not_is_not(study, tmp_path):
    before = fingerprint(expand(study, tmp_path)[0].settings)
    study["training"]["clip_gradient"] = 0.5
    study["data"]["workers"] = 3
    after = fingerprint(expand(study, tmp_path / "elsewhere")[0].settings)
    assert changed_settings(before, after) == {
        "training.clip_gradient": "training.clip_gradient was 1.0 and is 0.5"
    }


def test_what_decided_in_an_earlier_version_is_no_change(study, tmp_path):
    after = fingerprint(expand(study, tmp_path)[0].settings)
    before = after | {"training.skip_limit": 3, "from.from.training.skip_limit": 3}
    assert "training.skip_limit" not in after and not changed_settings(before, after)
    assert changed_settings(after | {"from.training.clip_gradient": 3}, after)


def test_a_change_of_what_is_scored_is_named(study, tmp_path, monkeypatch):
    def of(**given):
        study["study"]["evaluation"] = given
        folder = StudyFolder.open(study, tmp_path)
        return folder.identity(folder.cells[0])

    monkeypatch.setattr(StudyFolder, "text_of", lambda *_: SimpleNamespace(fingerprint="text"))
    before = of(documents=8)
    assert changed_settings(before, of(documents=8)) == {}
    assert changed_settings(before, of(documents=9)) == {
        "study.evaluation.documents": "study.evaluation.documents was 8 and is 9"
    }
    # one that an earlier version lacked is at its default
    del before["study.evaluation.shots"]
    assert changed_settings(before, of(documents=8)) == {}
    assert changed_settings(before, of(documents=8, shots=2))


def test_documents_are_apart_and_batches_in_tokens_unless_a_study_says_otherwise(study, tmp_path):
    del study["training"]["global_batch_size"]
    study["study"]["cells"][1]["set"] = {
        "data.document_masks": False,
        "training.global_batch_size": 12,
    }
    gpt, t5 = (cell.settings for cell in expand(study, tmp_path))
    assert gpt.data.document_masks and not t5.data.document_masks
    assert gpt.training.global_batch_tokens == 8 * 48  # rows by default, of the study's length
    assert (t5.training.global_batch_tokens, t5.training.global_batch_size) == (None, 12)
    study["training"]["global_batch_size"] = 16
    gpt = expand(study, tmp_path)[0].settings.training
    assert (gpt.global_batch_tokens, gpt.global_batch_size) == (None, 16)


def test_a_setting_that_an_earlier_version_lacked_is_a_change_only_off_its_default(study, tmp_path):
    after = fingerprint(expand(study, tmp_path)[0].settings)
    lacked = {"data.document_masks", "training.global_batch_tokens"}
    before = {name: value for name, value in after.items() if name not in lacked}
    assert changed_settings(before, after) == {
        "data.document_masks": "data.document_masks was None and is True"
    }
    assert changed_settings(before, after | {"data.document_masks": False}) == {}
    inherited = {f"from.{name}": value for name, value in after.items()}
    assert changed_settings(
        {f"from.{name}": value for name, value in before.items()}, inherited
    ) == {"from.data.document_masks": "from.data.document_masks was None and is True"}


def test_a_study_without_a_grid_and_mistakes_in_a_cell(raw, study, tmp_path):
    with pytest.raises(config.ConfigError, match="has no grid of cells"):
        expand(raw, tmp_path)
    study["study"]["cells"][1]["set"] = {"model.heads": 5}
    with pytest.raises(config.ConfigError, match="(?s)cell t5.*5 heads do not divide"):
        expand(study, tmp_path)


def adapted(study, tmp_path, **given):
    study["study"]["adapt"] = {"budget": 5e8} | given
    return {cell.name: cell for cell in expand(study, tmp_path)}


def test_every_cell_gets_a_child_of_the_same_budget_on_an_objective_that_it_runs(study, tmp_path):
    study["training"]["learning_rate"] = 0.5
    own = {"model": {"kv_heads": 4}, "data.mean_span_length": 4.0}
    study["study"]["cells"] = [
        {"name": "gpt", "preset": "gpt"},
        {"name": "t5", "preset": "t5", "set": own},
        {"name": "unilm", "preset": "unilm"},
        {"name": "more", "preset": "gpt", "from": "gpt", "budget": 1e8},
    ]
    cells = adapted(study, tmp_path, set={"training": {"warmup": 0.1}})
    assert list(cells)[4:] == ["gpt-adapted", "t5-adapted", "unilm-adapted", "more-adapted"]
    for name, objective in zip(
        list(cells)[:4], ("full_lm", "prefix_lm", "prefix_lm", "full_lm"), strict=True
    ):
        parent, child = cells[name], cells[f"{name}-adapted"]
        before, after = parent.settings, child.settings
        assert (child.parent, child.adaptation, parent.adaptation) == (parent.key, 5e8, None)
        assert after.model == before.model and after.data.objective == objective
        assert after.training.start_from == before.logging.directory
        assert (after.training.budget.amount, after.training.warmup) == (5e8, 0.1)
    assert cells["t5"].settings.data.mean_span_length == 4.0
    assert cells["t5-adapted"].settings.data.mean_span_length is None, "prefix_lm has no spans"
    study["study"]["budgets"] = [1e9, 2e9]
    assert len(expand(study, tmp_path)) == 16


def test_an_adapted_cell_has_its_parents_rate_unless_a_sweep_knows_its_own(study, tmp_path):
    study["study"]["adapt"] = {"budget": 5e8}
    rates = {"gpt": 0.1, "t5": 0.2, "t5-adapted": 0.3}
    chosen = {name: {RATE: rate} for name, rate in rates.items()}
    found = {cell.name: cell for cell in expand(study, tmp_path, chosen)}
    assert found["gpt-adapted"].settings.training.learning_rate == 0.1
    assert found["t5-adapted"].settings.training.learning_rate == 0.3


def test_a_cell_that_cannot_be_adapted_is_left_out_with_its_reason(study, pairs, tmp_path):
    study["study"]["cells"] = [
        *({"name": name, "preset": name} for name in ("bert", "xlnet", "glm", "gpt", "bart")),
        {
            "name": "tuned",
            "preset": "gpt",
            "from": "gpt",
            "set": {"data.objective": "supervised", "data.source": pairs},
        },
    ]
    study["study"]["cells"].append(study["study"]["cells"][-1] | {"name": "again"})
    cells = adapted(study, tmp_path)
    assert [name for name, cell in cells.items() if cell.adaptation] == [
        "gpt-adapted",
        "bart-adapted",
    ]
    assert not_adapted(list(cells.values()), config.resolve(study).study) == [
        "bert is not adapted (study.adapt): the architecture encoder does not run prefix_lm.",
        "xlnet is not adapted (study.adapt): the architecture two_stream does not run prefix_lm.",
        "glm is not adapted (study.adapt): positions mean something else under prefix_lm: the "
        "number of position axes is 2 there and 1 here, and RoPE divides the frequencies of a head "
        "among them.",
        "tuned, again are not adapted (study.adapt): what is finetuned on pairs of input and target "
        "is left out.",
    ]
    wanted = adapted(study, tmp_path, objective="denoising")
    assert wanted["gpt-adapted"].settings.data.objective == "denoising"


def test_mistakes_in_what_adapts_are_told(study, tmp_path):
    with pytest.raises(config.ConfigError, match="study.adapt.objective: must be one of"):
        adapted(study, tmp_path, objective="prefix")
    with pytest.raises(config.ConfigError, match="study.adapt.set: training.seed is the study's"):
        adapted(study, tmp_path, set={"training.seed": 3})
    study["study"]["cells"][1]["name"] = "gpt-adapted"
    with pytest.raises(config.ConfigError, match="makes a cell 'gpt-adapted', and one of that"):
        adapted(study, tmp_path)
