"""`megaarch probe`: what it refuses, each in a sentence, and what it writes of a study."""

import pytest

from megaarch.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ranks", "runs"], "there is no probe 'ranks': choose among rank, position"),
        (["rank"], "give the folders of runs, or --study DIR"),
        (["rank", "a", "--study", "b"], "give the folders of runs, or --study DIR"),
        (["masks", "a"], "masks looks at no run"),
        (["rank", "a", "--rows", "1"], "--rows 1: give 2 to 100,000"),
        (["rank", "a", "--length", "99999999999"], "--length 99999999999: give 4 to"),
        (["rank", "a", "--seed", "-1"], "--seed -1: give 0 to"),
        (["rank", "nowhere"], "nowhere is no folder: give the folder of a run"),
        (["rank", "--study", "nowhere"], "nowhere is no study's folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", *arguments]) == 2
    out, err = capsys.readouterr()
    assert says in err.splitlines()[-1]
    assert not out and "Traceback" not in err


def test_rows_longer_than_the_text_are_refused(runs, capsys):
    assert main(["probe", "rank", runs("gpt"), "--length", "4000"]) == 2
    assert "no held-out document has 4000 tokens for a row" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "reused"), [("gpt", True), ("bert", False)])
def test_what_a_dialogue_costs_is_printed(preset, reused, runs, capsys):
    """The table had a head and no row, for nothing of it is an estimate."""
    assert main(["probe", "dialogue", runs(preset), "--length", "8"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:] if line)
    assert rows["tokens"] == "4"
    assert ("flops.reuse" in rows and len(rows["flops.reuse"].split()) == 8) == reused
    assert (rows["answer_bytes_per_token"] != "-") == reused
