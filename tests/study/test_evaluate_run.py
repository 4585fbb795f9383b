"""What `megaarch evaluate` scores: text that the run has not seen, or it says so."""

import json

import pytest

from megaarch import config
from megaarch.cli.main import main
from megaarch.errors import UserError
from megaarch.ingest.prepare import prepare
from megaarch.study import evaluate_run
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


def warnings(folder, *overrides):
    return evaluate_run.evaluate_run(folder, ["study.evaluation.lengths=[1, 2]", *overrides])[1]


def test_lengths_that_no_row_holds_are_named(run):
    folder, _ = run
    [warning] = evaluate_run.evaluate_run(folder, ["study.evaluation.lengths=[1, 99, 100]"])[1]
    assert warning.startswith("Continuations of 99, 100 tokens are left out")


def test_a_source_that_has_changed_since_is_refused_and_other_text_is_not(run, tmp_path):
    folder, corpus = run
    assert warnings(folder) == []
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text())
    grow(corpus)
    with pytest.raises(ValueError, match=r"text.jsonl has changed since the run was trained"):
        evaluate_run.evaluate_run(folder)
    [told] = warnings(folder, f"data.source={other}")
    assert "may have seen" not in told


def test_of_other_text_it_is_told_how_much_is_scored(run, tmp_path):
    """A test set was scored by its tenth, and nothing said so."""
    folder, corpus = run
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text())
    for share, expected in (("0.1", 0.1), ("0.5", 0.5)):
        [told] = warnings(folder, f"data.source={other}", f"data.held_out={share}")
        said = told.removeprefix(f"Of {other} ").partition(
            "% is scored, what data.held_out holds out"
        )[0]
        assert expected <= int(said) / 100 <= 1.5 * expected
    assert warnings(folder) == []


def test_another_split_of_the_same_source_is_scored_with_a_warning(run):
    folder, _ = run
    [warning] = warnings(folder, "data.held_out=0.4")
    assert "split otherwise" in warning


def test_a_cell_with_text_of_its_own_is_scored_with_a_warning(run):
    """The study's held-out text was left out of it, which evaluate does not have."""
    folder, corpus = run
    data = {"excluded_documents": 2, "excluded_paragraphs": 0}
    result = example_cell("gpt") | {"data": data}
    (folder / "cell.json").write_text(json.dumps({"signature": {}, "result": result}))
    grow(corpus)
    for given in (folder, next((folder / "checkpoints").glob("step-*"))):
        [warning] = warnings(given)
        assert "cannot be told" in warning


def test_a_cell_is_scored_on_documents_that_chose_nothing_and_a_run_of_no_study_on_all(
    run, tmp_path
):
    """On other text, by which nothing was chosen, a cell too."""
    folder, corpus = run
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text())

    def thirds(*overrides):
        paired = evaluate_run.evaluate_run(folder, overrides)[0].paired
        return {document % 3 for document in paired.documents}

    assert thirds() == {0, 1, 2}
    (folder / "cell.json").write_text(json.dumps({"signature": {}}))
    assert thirds() == {1, 2}
    assert thirds(f"data.source={other}") == {0, 1, 2}
    (tmp_path / "study.yaml").write_text(json.dumps({"data": {"source": str(other)}}))
    assert thirds(f"data.source={other}") == {1, 2}


def test_what_is_scored_can_be_set(run):
    """Also what the sentence on short documents advises."""
    folder, _ = run
    fewer = ["study.evaluation.prefix_tokens=4", "study.evaluation.documents=3"]
    found, _ = evaluate_run.evaluate_run(folder, fewer)
    assert found.items["continuation"] == 3
    with pytest.raises(UserError, match=r"study.evaluation.prefix: Extra inputs are not permitted"):
        evaluate_run.evaluate_run(folder, ["study.evaluation.prefix=4"])


def test_tasks_are_scored_of_one_run(run, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "test.jsonl").write_text('{"n": 1}\n' * 2)
    wording = {"name": "w", "prompt": "{{ n }} ||| a", "choices": "a ||| b"}
    said = {"summary": "s", "data": {"test": "test.jsonl"}, "wordings": [wording]}
    (tmp_path / "letters.task.yaml").write_text(json.dumps(said))
    assert main(["evaluate", str(folder), "--tasks", str(tmp_path / "letters.task.yaml")]) == 0
    printed = capsys.readouterr().out
    [row] = [line.split() for line in printed.splitlines() if line.startswith("letters")]
    assert row[1] in ("0.0000", "1.0000") and row[-2:] == ["0.500", "2"]
    assert main(["evaluate", str(folder), "--tasks", str(tmp_path)]) == 0
    with pytest.raises(UserError, match="1 examples were asked for, and it has 0"):
        evaluate_run.evaluate_run(
            folder, [f"study.evaluation.tasks=[{tmp_path}]", "study.evaluation.shots=1"]
        )


def test_numbers_of_shots_are_a_curve_whose_first_one_ranks(run, tmp_path):
    folder, _ = run
    items = "".join(f'{{"n": {n}, "answer": "{"ab"[n % 2]}"}}\n' for n in range(12))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(items)
    wording = {"name": "w", "prompt": "{{ n }} is ||| {{ answer }}", "choices": "a ||| b"}
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    said = {"summary": "s", "data": data, "wordings": [wording]}
    (tmp_path / "letters.task.yaml").write_text(json.dumps(said))

    def letters(shots):
        given = [f"study.evaluation.tasks=[{tmp_path}]", f"study.evaluation.shots={shots}"]
        return evaluate_run.evaluate_run(folder, given)[0].tasks["letters"]

    curve = letters([2, 0])
    assert list(curve.by_shots) == ["2", "0"]
    assert (curve.accuracy, curve.right) == (letters(2).accuracy, letters(2).right)
    for number in (0, 2):
        alone = letters(number)
        assert alone.by_shots == {}
        assert curve.by_shots[str(number)] == alone
