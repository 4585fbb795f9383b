"""The study at scale: its record, what the planner says today, and the page."""

import json
from pathlib import Path

import pytest

from megaarch.planner.dry_run import planned
from megaarch.planner.hardware import gpu
from megaarch.planner.memory import step_memory
from megaarch.planner.time import Cluster, step_seconds
from tools.planning import at_scale

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "2026-12-01-scale.json").read_text())
STUDY = str(ROOT / "configs" / "studies" / "scale.yaml")


@pytest.fixture(scope="module")
def layouts():
    """Maps each cell of the study to its settings in the recorded layout."""
    return at_scale.layouts(RECORD, STUDY)


def test_the_record_is_of_every_cell_and_is_what_the_planner_still_says(layouts):
    assert [plan["name"] for plan in RECORD["plans"]] == list(layouts)
    assert len(layouts) == 32
    cluster = Cluster(gpu("h100"))
    for plan in RECORD["plans"][::3]:  # of every architecture and size some
        settings = layouts[plan["name"]]
        assert step_memory(settings).total == pytest.approx(plan["memory"]["total"]), plan["name"]
        seconds = step_seconds(settings, cluster).total
        assert seconds == pytest.approx(plan["seconds"]["total"]), plan["name"]


def test_each_dry_run_held_what_the_planner_says_within_a_tenth(layouts):
    assert RECORD["dry_runs"]
    for found in RECORD["dry_runs"]:
        expected = planned(layouts[found["cell"]], found["rank"])
        assert abs(expected / found["peak"] - 1) < 0.10, found["cell"]


def test_the_page_holds_the_tables_of_the_record():
    page = (ROOT / "docs" / "planning.md").read_text()
    ask = "run python -m tools.planning.at_scale RECORD"
    assert at_scale.plans(RECORD) in page and at_scale.dry_runs(RECORD) in page, ask


def test_recounted_a_record_keeps_its_layouts_and_dry_runs(tmp_path):
    path = tmp_path / "record.json"
    old = json.loads(json.dumps(RECORD))
    for plan in old["plans"]:
        plan["seconds"]["total"] = plan["memory"]["total"] = plan["gpu_hours"] = 1.0
    path.write_text(json.dumps(old))
    found = at_scale.recount(path, STUDY, 1024, "h100")
    assert found == json.loads(path.read_text()) and found["recounted"]
    for mine, recorded in zip(found["plans"], RECORD["plans"], strict=True):
        assert mine["settings"] == recorded["settings"], mine["name"]
        assert mine["gpu_hours"] == pytest.approx(recorded["gpu_hours"]), mine["name"]
        assert mine["memory"]["total"] == pytest.approx(recorded["memory"]["total"])
    assert found["dry_runs"] == RECORD["dry_runs"]


def test_a_record_is_made_once_and_continued_where_it_was_left(tmp_path, monkeypatch):
    asked = []

    def answer(arguments):
        asked.append(arguments)
        if arguments[0] == "plan":
            return {"plans": [{"name": name} for name in ("gpt/1b", "gpt/9b", "t5/9b")]}
        if arguments[3] == "t5/9b" and len(asked) < 4:
            raise ValueError("interrupted")
        return {"cell": arguments[3]}

    monkeypatch.setattr(at_scale, "_ask", answer)
    given = (tmp_path / "record.json", "study.yaml", ["--gpus", "8"], ["9b"])
    with pytest.raises(ValueError, match="interrupted"):
        at_scale.make(*given)
    record = at_scale.make(*given)
    assert [found["cell"] for found in record["dry_runs"]] == ["gpt/9b", "t5/9b"]
    assert [arguments[0] for arguments in asked] == ["plan", "dry-run", "dry-run", "dry-run"]
    assert record["commit"] and json.loads(given[0].read_text()) == record
    with pytest.raises(ValueError, match="is of another command"):
        at_scale.make(given[0], "other.yaml", *given[2:])
