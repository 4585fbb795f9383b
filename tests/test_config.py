"""Settings: presets fill, overrides win, and every mistake is told at once with its path."""

import pytest

from megaarch import catalogue, config


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
    settings = config.load(file, ["model.layers=5", "model.bias=true", "training.z_loss=1e-4"])
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


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"model": {"preset": "bert"}, "data": {"objective": "full_lm"}}, "does not run on"),
        ({"model": {"heads": 4, "kv_heads": 3}}, "3 key heads do not divide 4 heads"),
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
        ({"data": {"source": [{"pth": "x"}]}}, "did you mean data.source.path?"),
        ({"model": 3}, "must be a section"),
    ],
)
def test_impossible_combinations(raw, sentence):
    assert any(sentence in problem for problem in problems(raw)), problems(raw)


def test_broken_yaml_names_file_and_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  layers: [\n")
    with pytest.raises(config.ConfigError, match=r"a\.yaml: line 3"):
        config.load(file)
    file.write_text("model:\n  layers: 1\n  layers: 2\n")
    with pytest.raises(config.ConfigError, match=r"line 3.*given twice"):
        config.load(file)
    with pytest.raises(config.ConfigError, match="cannot read"):
        config.load(tmp_path / "absent.yaml")
    with pytest.raises(config.ConfigError, match="section.name=value"):
        config.parse_override("model.layers")


def test_an_empty_section_is_an_empty_section():
    assert config.resolve({"model": None}).model.layers == 6


def test_oddities_of_yaml_and_of_set(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\ntraining: &t {steps: 3}\n")
    assert config.load(file, ["model.layers=1"]).model.layers == 1
    file.write_text("model: {{n}}\n")
    with pytest.raises(config.ConfigError, match=r"a\.yaml: line 1"):
        config.load(file)
    with pytest.raises(config.ConfigError, match="model.preset: must be"):
        config.resolve({"model": {"preset": ["gpt"]}})
    study = {"budgets": [1e9, 1.00001e9], "seeds": [0, 0], "cells": [{"name": "a", "budget": 1.0}]}
    found = problems({"study": study})
    assert "study.budgets: 1e+09 is given twice" in found
    assert "study.seeds: 0 is given twice" in found
    assert any(problem.startswith("study.cells.0.budget") for problem in found)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"training": {"learning_rate": float("inf")}}, "must be a finite number"),
        ({"study": {"budgets": [], "cells": [{"name": "a"}]}}, "study.budgets: must be a list of"),
        (
            {"study": {"budgets": [1.0], "cells": [{"name": "a"}], "sizes": [{"name": "../x"}]}},
            "cannot be the name of a folder",
        ),
    ],
)
def test_values_that_would_hang_or_leave_the_folder(raw, sentence):
    assert any(sentence in problem for problem in problems(raw)), problems(raw)
