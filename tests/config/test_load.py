"""Settings: presets fill, overrides win, and every mistake is told at once with its path."""

import pickle
from pathlib import Path

import pytest

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.idle import IDLE, idle
from megaarch.config.suggest import flatten, setting_names
from megaarch.study.cells import expand


def problems(raw):
    with pytest.raises(config.ConfigError) as caught:
        config.resolve(raw)
    return caught.value.problems


def test_preset_fills_architecture_and_objective():
    for name, preset in catalogue.PRESETS.items():
        settings = config.resolve({"model": {"preset": name, "head_size": 64}})
        assert settings.model.architecture == preset.architecture
        assert settings.data.objective == preset.objective


def test_what_the_user_gives_wins_over_the_preset():
    raw = {"model": {"preset": "gpt", "architecture": "prefix_decoder"}}
    raw["data"] = {"objective": "span_corruption"}
    settings = config.resolve(raw)
    assert settings.model.architecture == "prefix_decoder"
    assert settings.data.objective == "span_corruption"


def test_overrides_are_yaml_and_win_over_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  layers: 2\ntraining:\n  learning_rate: 3e-4\n")
    settings = config.load_config(
        file, ["model.layers=5", "model.bias=true", "training.z_loss=1e-4"]
    )
    assert (settings.model.layers, settings.model.bias) == (5, True)
    assert settings.training.learning_rate == 3e-4
    assert settings.training.z_loss == 1e-4


def test_all_mistakes_at_once_with_the_nearest_name():
    found = problems(
        {
            "model": {"hiden_size": 64, "layers": "two", "heads": 3},
            "data": {"objective": "span_coruption"},
            "training": {"steps": 5, "budget": {"amount": 1e9}, "learning_rate": -1},
        }
    )
    text = "\n".join(found)
    assert "model.hiden_size: unknown setting; did you mean model.hidden_size?" in found
    assert "model.layers: must be a whole number, not 'two'" in found
    assert "did you mean span_corruption?" in text
    assert "training.learning_rate: must be more than 0" in text
    assert "training.steps: cannot be given together with training.budget" in text
    assert "model.heads: 3 heads do not divide hidden_size 256" in text
    assert len(found) == 6


def test_an_objectives_settings_are_told_with_the_rest():
    assert problems(
        {
            "model": {
                "preset": "t5",
                "layers": 0,
                "position_encoding": "relative",
                "relative_buckets": 2,
            },
            "data": {"noise_density": 0.95, "mean_span_length": 0.5, "max_predictions": 3},
        }
    ) == [
        "model.layers: must be more than 0, not 0",
        "data.noise_density: span_corruption needs a noise density above 0 and at most 0.9, not "
        "0.95",
        "data.mean_span_length: span_corruption needs a mean span length of at least 1, not 0.5",
        "data.max_predictions: objective span_corruption has no max_predictions: leave it out",
        "model.relative_buckets: a relative bias of 2 buckets cannot reach 128 tokens: give at least "
        "4 buckets, and a distance of more than a quarter of them",
    ]


def test_settings_of_objectives_and_biases_are_judged_in_each_cell_of_a_study():
    """The study's own objective and architecture may be those of no cell."""
    cells = [
        {"name": "t5", "preset": "t5"},
        {"name": "bert", "preset": "bert", "set": {"model.relative_buckets": 4}},
    ]
    raw = {
        "model": {"position_encoding": "relative", "relative_buckets": 1},
        "data": {"noise_density": 0.3},
        "study": {"budgets": [1e9], "cells": cells},
    }
    config.resolve(raw)
    with pytest.raises(config.ConfigError, match="cell t5: model.relative_buckets: a relative bia"):
        expand(raw, Path("runs"))
    cells[0]["set"] = {"model.relative_buckets": 8}
    assert [cell.name for cell in expand(raw, Path("runs"))] == ["t5", "bert"]


def set_in_cell(given, cell=None, **study):
    """A study of two cells, the second of which sets what is given."""
    cells = [{"name": "parent"}, {"name": "a", "set": given} | (cell or {})]
    return {"study": {"budgets": [1], "cells": cells} | study}


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"data": {"noise_density": 0.3}}, "data.noise_density: objective full_lm has no noise_"),
        (
            {"model": {"preset": "ul2"}, "data": {"whole_word_masking": True}},
            "data.whole_word_masking: objective ul2 has no whole_word",
        ),
        (
            {"data": {"objective": "supervised", "noise_density": 0.1}},
            "data.noise_density: supervised examples are pairs",
        ),
        (
            {"model": {"position_encoding": "relative", "relative_max_distance": 16}},
            "model.relative_buckets: a relative bias of 32 buckets cannot reach 16 tokens",
        ),
        ({"model": {"preset": "bert"}, "data": {"objective": "full_lm"}}, "does not run on"),
        ({"model": {"heads": 4, "kv_heads": 3}}, "3 key heads do not divide 4 heads"),
        ({"model": {"initializer": "t5x", "initial_deviation": 0.03}}, "has no meaning under t5x"),
        ({"model": {"hidden_size": 12, "heads": 4}}, "rope over 1 position axis"),
        ({"model": {"preset": "glm", "head_size": 6}}, "divisible by 4"),
        ({"model": {"preset": "glm", "position_encoding": "relative"}}, "use rope"),
        ({"model": {"target_length": 8}}, "belongs to an encoder_decoder"),
        ({"training": {"micro_batch_size": 3, "global_batch_size": 8}}, "do not divide into"),
        ({"model": {"position_encoding": "learned", "learned_positions": 4}}, "fewer than"),
        ({"study": {"budgets": [1], "cells": [{"name": "a", "from": "b"}]}}, "no cell 'b'"),
        ({"study": {"budgets": [1], "cells": [{"name": "a"}, {"name": "a"}]}}, "two cells"),
        (
            {"study": {"budgets": [1], "cells": [{"name": "a", "set": {"model.layrs": 1}}]}},
            "did you mean model.layers?",
        ),
        (
            {
                "study": {
                    "budgets": [1],
                    "cells": [{"name": "a", "set": {"data": {"tokenizer": "x"}}}],
                }
            },
            "data.tokenizer is the study's to set",
        ),
        (
            {"training": {"seed": 3}, "study": {"budgets": [1], "cells": [{"name": "a"}]}},
            "training.seed: a study's cells have the seeds of study.seeds",
        ),
        (
            {"logging": {"directory": "x"}, "study": {"budgets": [1], "cells": [{"name": "a"}]}},
            "logging.directory: a study's folder is runs/NAME, or what --output says",
        ),
        (
            set_in_cell({"training": {"budget": {"amount": 9}}}),
            "training.budget.amount is the study's",
        ),
        (
            set_in_cell({"training.start_from": "x"}, {"from": "parent"}),
            "training.start_from is the cell that from names",
        ),
        (
            set_in_cell(
                {"training.global_batch_tokens": 512},
                tune={"learning_rates": [1e-3], "global_batch_tokens": [256, 1024]},
            ),
            "training.global_batch_tokens is tried by the sweep",
        ),
        ({"data": {"source": [{"pth": "x"}]}}, "did you mean data.source.path?"),
        ({"model": 3}, "must be a section"),
        (
            {"data": {"max_input_length": 9}},
            "data.max_input_length: is a limit of supervised pairs; full_lm has none",
        ),
        (
            {"data": {"objective": "supervised", "max_input_length": 512, "max_target_length": 1}},
            "data.max_input_length: 513 tokens of input and target do not fit a row of 512",
        ),
        (
            {"data": {"objective": "supervised", "max_target_length": 512}},
            "data.max_target_length: 513 tokens of input and target do not fit a row of 512",
        ),
        (
            {
                "model": {"architecture": "encoder_decoder", "target_length": 99},
                "data": {"objective": "supervised", "max_target_length": 100},
            },
            "data.max_target_length: 100 tokens do not fit a row of 99: raise model.target_length",
        ),
    ],
)
def test_impossible_combinations(raw, sentence):
    assert any(sentence in problem for problem in problems(raw)), problems(raw)


def test_what_is_given_and_has_no_effect_is_told():
    given = {
        "model": {"position_encoding": "none", "rope_base": 5e5},
        "data": {"pack": False, "document_masks": True},
        "training": {"optimizer": "adafactor", "beta1": 0.0, "schedule": "constant", "decay": 0.5},
    }
    assert list(idle(config.resolve(given))) == [
        "model.rope_base: 500000.0 has no effect, for model.position_encoding is none",
        "training.decay: 0.5 has no effect, for training.schedule is constant",
        "training.beta1: 0.0 has no effect, for training.optimizer is adafactor",
        "data.pack: False has no effect, for data.objective is full_lm",
    ]
    given["data"]["objective"] = "supervised"
    masks = "data.document_masks: True has no effect, for data.objective is supervised"
    assert list(idle(config.resolve(given)))[-1] == masks
    used = {"training": {"schedule": "wsd", "decay": 0.5, "minimum_learning_rate": 0.0}}
    assert not list(idle(config.resolve(used)))


def test_what_makes_a_setting_idle_is_a_value_of_the_other():
    names = set(setting_names())
    for setting, (chooser, values) in IDLE.items():
        assert {setting, chooser} <= names
        for value in values:
            raw = {}
            config.set_path(raw, chooser, value)
            assert flatten(config.resolve(raw).model_dump())[chooser] == value


def test_broken_yaml_names_file_and_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  layers: [\n")
    with pytest.raises(config.ConfigError, match=r"a\.yaml: line 3"):
        config.load_config(file)
    file.write_text("model:\n  layers: 1\n  layers: 2\n")
    with pytest.raises(config.ConfigError, match=r"line 3.*given twice"):
        config.load_config(file)
    with pytest.raises(config.ConfigError, match="cannot read"):
        config.load_config(tmp_path / "absent.yaml")
    with pytest.raises(config.ConfigError, match="section.name=value"):
        config.parse_override("model.layers")


def test_a_mapping_goes_into_a_section_and_leaves_the_rest(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {layers: 3, heads: 2}\ntraining: {seed: 5}\n")
    found = config.load_config(
        file, ["model={layers: 4}", "training.budget={match: flops, amount: 1e9}"]
    )
    assert (found.model.layers, found.model.heads, found.training.seed) == (4, 2, 5)
    assert found.training.budget.amount == 1e9
    with pytest.raises(config.ConfigError, match=r"did you mean model.layers\?"):
        config.load_config(file, ["model={layrs: 4}"])


def test_a_wrong_value_is_told_once():
    assert problems({"study": {"budgets": ["x"], "cells": [{"name": 3, "preset": "gpt"}]}}) == [
        "study.budgets.0: must be a number, not 'x'",
        "study.cells.0.name: must be text, not 3",
    ]
    assert problems({"study": {"budgets": [1e9]}}) == ["study.cells: is required"]


def test_an_empty_section_is_an_empty_section():
    assert config.resolve({"model": None}).model.layers == 6


def test_oddities_of_yaml_and_of_set(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\ntraining: &t {steps: 3}\n")
    assert config.load_config(file, ["model.layers=1"]).model.layers == 1
    file.write_text("model: {{n}}\n")
    with pytest.raises(config.ConfigError, match=r"a\.yaml: line 1"):
        config.load_config(file)
    with pytest.raises(config.ConfigError, match="model.preset: must be"):
        config.resolve({"model": {"preset": ["gpt"]}})
    study = {"budgets": [1e9, 1.00001e9], "seeds": [0, 0], "cells": [{"name": "a", "budget": 1.0}]}
    found = problems({"study": study})
    assert "study.budgets: 1e+09 is given twice, as folders are named" in found
    assert "study.seeds: 0 is given twice" in found
    assert any(problem.startswith("study.cells.0.budget") for problem in found)
    tune = {"learning_rates": [0.0012341, 0.0012342], "encoder_shares": [0.5, 0.50001]}
    study = {
        "budgets": [1e9],
        "cells": [{"name": "a"}],
        "tune": tune,
        "evaluation": {"shots": (1, 1)},
    }
    found = problems({"study": study})
    assert any(
        problem.startswith("study.tune.learning_rates: 0.00123 is given twice, as")
        for problem in found
    )
    assert any(
        problem.startswith("study.tune.encoder_shares: 0.5 is given twice, as") for problem in found
    )
    assert "study.evaluation.shots: 1 is given twice" in found


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"training": {"learning_rate": float("inf")}}, "must be a finite number"),
        ({"training": {"threads": 100_000}}, "training.threads: must be at most 1024"),
        ({"logging": {"directory": ""}}, "logging.directory: must be a text that is not empty"),
        ({"data": {"source": ""}}, "data.source: must be a text that is not empty"),
        ({"study": {"budgets": [], "cells": [{"name": "a"}]}}, "study.budgets: must be a list of"),
        (
            {"study": {"budgets": [1.0], "cells": [{"name": "a"}], "sizes": [{"name": "../x"}]}},
            "cannot be the name of a folder",
        ),
    ],
)
def test_values_that_would_hang_or_leave_the_folder(raw, sentence):
    assert any(sentence in problem for problem in problems(raw)), problems(raw)


def test_mistakes_reach_another_process_as_they_were_told():
    told = config.ConfigError(["a: is wrong", "b: is wrong too"], "run.yaml")
    again = pickle.loads(pickle.dumps(told))
    assert str(again) == str(told) and again.problems == told.problems
