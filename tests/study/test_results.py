"""The records of a study: what was written loads and stays as it is, and damage is named by its key."""

import copy
import json
from pathlib import Path

import pytest

from megaarch.cli import main
from megaarch.study.results import CellResult, LossPoint, Results, read_points
from tests.study.example_results import example_results, scaling_results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["2026-11-28-demo.json", "2026-11-27-demo-t5-longer.json"])
def test_committed_results_are_written_back_as_they_are(name):
    found = json.loads((BENCHMARKS / name).read_text())
    assert Results.of(found).as_json() == found


@pytest.mark.parametrize("make", [example_results, scaling_results])
def test_results_of_an_earlier_version_load_with_keys_of_a_later_one(make):
    found = make()
    found["cells"][0] |= {"later": {"key": 1}}
    found["cells"][0]["heldout"]["prefix_gain"] = 0.1
    assert Results.of(found).as_json() == found


def put(found, path, value):
    *above, last = path.split(".")
    for key in above:
        found = found[int(key)] if isinstance(found, list) else found[key]
    if value is None:
        del found[last]
    else:
        found[last] = value


@pytest.mark.parametrize(
    "path, value",
    [
        *[("cells.1.flops", value) for value in (None, "x", [], True)],
        *[("cells.0.heldout.continuation_bits_per_byte", value) for value in (None, {})],
        *[("cells.0.losses.3.loss", value) for value in (None, "x")],
        *[("cells.2.curve.0.flops", value) for value in (None, "x")],
        *[("cells.0.heldout.items.choice", value) for value in (-1, 0.5)],
        ("cells.0.masks.0.parts", [[1, 9, 3, 0, 9]]),
        ("budget.match", 3),
        ("unigram_bits_per_byte", "x"),
    ],
)
def test_a_damaged_results_json_is_told_by_its_key(path, value, tmp_path, capsys):
    found = example_results()
    put(found, path, value)
    (tmp_path / "results.json").write_text(json.dumps(found))
    for form in ([], ["--text"], ["--csv"], ["--latex"]):
        assert main(["report", str(tmp_path), *form]) == 2
        error = capsys.readouterr().err
        key = path.removesuffix(".parts")
        assert str(tmp_path / "results.json") in error and f"{key}:" in error
        assert "Error" not in error, "the name of an exception says nothing to a user"


def test_numbers_that_json_has_not_are_missing_ones():
    found = example_results()
    found["cells"][0]["final_loss"] = float("nan")
    found["cells"][0]["heldout"]["continuation_interval"] = [1.0, float("inf")]
    cell = Results.of(found).cells[0]
    assert cell.final_loss is None and cell.heldout.interval() is None
    assert CellResult(**copy.deepcopy(found["cells"][1])).heldout.interval() is not None


def test_a_damaged_line_of_metrics_is_left_out_with_a_warning(tmp_path, caplog):
    line = {"step": 1, "flops": 10, "seconds": 0.5, "loss": 3.0, "learning_rate": 1e-3}
    odd = [line | {"step": 2, "loss": "x"}, {"step": 3, "flops": 20, "seconds": 1.0}]
    last = line | {"step": 4, "loss": None}  # of a skipped step
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(found) + "\n" for found in (line, *odd, last)))
    assert [point.step for point in read_points(path, LossPoint)] == [1, 4]
    assert f"{path}: step 2 is damaged and left out: loss: " in caplog.text
    assert "step 3 is damaged and left out: loss: Field required" in caplog.text
