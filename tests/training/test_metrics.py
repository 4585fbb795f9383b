"""metrics.jsonl after a crash: what is damaged is left out and named, the rest is kept."""

import json

import pytest

from megaarch.training.metrics import cut_back, read_lines
from megaarch.training.trainer import Trainer

DAMAGED = ["\0" * 300, "{", "[1]", "3", "null", '{"loss": 1}', '{"step": "4"}', "[" * 3000]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_leaves_the_rest(damage, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    sound = [json.dumps({"step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join([sound[0], damage, *sound[1:]]) + "\n")
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert "metrics.jsonl: line 2 is damaged and left out" in caplog.text
    cut_back(path, 2)
    assert path.read_text() == "\n".join(sound[:2]) + "\n"


def test_nuls_before_a_sound_line_are_no_part_of_it(tmp_path):
    """As a crash and then an append leave them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "\0" * 100 + '{"step": 2}\n')
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_a_run_whose_metrics_hold_nuls_goes_on(tiny, prepared, tmp_path):
    Trainer(tiny(training__steps=3), prepared).run()
    path = tmp_path / "run" / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, "\0" * 4096, *rest]) + "\n")
    Trainer(tiny(training__steps=5), prepared).run()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
