"""What `megaarch evaluate` scores: text that the run has not seen, or it says so."""

import json

import pytest

from megaarch import config
from megaarch.ingest.prepare import prepare
from megaarch.study import evaluate
from megaarch.training.trainer import Trainer
from tests.conftest import made_up_text, tiny_raw, write_corpus
from tests.study.example_results import example_cell


@pytest.fixture
def run(tmp_path):
    """(folder, corpus) of a run that was trained for one step."""
    corpus = write_corpus(tmp_path)
    raw = tiny_raw(corpus, tmp_path / "cache")
    config.set_path(raw, "logging.directory", str(tmp_path / "run"))
    config.set_path(raw, "training.steps", 1)
    settings = config.resolve(raw)
    Trainer(settings, prepare(settings.data, 512)).run()
    return tmp_path / "run", corpus


def grow(corpus):
    with corpus.open("a") as file:
        for i in range(1000, 1040):
            file.write(json.dumps({"text": made_up_text(i, 60)}) + "\n")


def test_a_source_that_has_changed_since_is_refused_and_other_text_is_not(run, tmp_path):
    folder, corpus = run
    assert evaluate.evaluate_run(folder)[1] == []
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text())
    grow(corpus)
    with pytest.raises(ValueError, match=r"text.jsonl has changed since the run was trained"):
        evaluate.evaluate_run(folder)
    assert evaluate.evaluate_run(folder, [f"data.source={other}"])[1] == []


def test_another_split_of_the_same_source_is_scored_with_a_warning(run):
    folder, _ = run
    [warning] = evaluate.evaluate_run(folder, ["data.held_out=0.4"])[1]
    assert "split otherwise" in warning


def test_a_cell_with_text_of_its_own_is_scored_with_a_warning(run):
    """The study's held-out text was left out of it, which evaluate does not have."""
    folder, corpus = run
    data = {"excluded_documents": 2, "excluded_paragraphs": 0}
    result = example_cell("gpt") | {"data": data}
    (folder / "cell.json").write_text(json.dumps({"signature": {}, "result": result}))
    grow(corpus)
    [warning] = evaluate.evaluate_run(folder)[1]
    assert "cannot be told" in warning
