"""Which run a path names: its own folder, or STUDY/CELL."""

from pathlib import Path

import pytest

from megaarch.cli.main import main
from megaarch.errors import UserError
from megaarch.training.opened import run_folder

GPT, SMALL, LARGE, BERT = (
    f"cells/{name}/{key}-1e+10-seed0"
    for name, key in (("gpt", "base"), ("t5", "small"), ("t5", "large"), ("bert", "base"))
)


@pytest.fixture
def study(tmp_path):
    """A study with a run of gpt, two of t5, and one of bert that has no checkpoint yet."""
    (tmp_path / "study.yaml").touch()
    for run in (GPT, SMALL, LARGE):
        (tmp_path / run / "checkpoints" / "step-00000001").mkdir(parents=True)
        (tmp_path / run / "tune" / "rate" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / BERT / "checkpoints").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ("gpt", GPT),
        ("gpt/base-1e+10-seed0", GPT),
        ("cells/gpt", GPT),
        (GPT, GPT),
        ("t5/small-1e+10-seed0", SMALL),
        (f"{GPT}/tune/rate", f"{GPT}/tune/rate"),
    ],
)
def test_a_path_in_a_study_is_the_run_of_a_cell(given, run, study, monkeypatch):
    assert run_folder(study / given) == study / run
    monkeypatch.chdir(study)
    assert run_folder(Path(given)) == Path(run)


@pytest.mark.parametrize(
    ("given", "what", "listed"),
    [
        (".", "is a study", (GPT, LARGE, SMALL)),
        ("cells", "is a study", (GPT, LARGE, SMALL)),
        ("t5", "names 2 trained cells", (LARGE, SMALL)),
        ("bert", "names no trained cells", (GPT, LARGE, SMALL)),
        ("gtp", "names no trained cells", (GPT, LARGE, SMALL)),
    ],
)
def test_a_path_that_names_no_one_run_lists_them(given, what, listed, study):
    with pytest.raises(UserError, match=what) as caught:
        run_folder(study / given)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [f"  {run.split('/')[1]}: {study / run}" for run in listed]


def test_a_study_that_has_not_begun_and_what_lies_in_none(study, tmp_path_factory):
    (other := tmp_path_factory.mktemp("other") / "study").mkdir()
    assert run_folder(other) == other and run_folder(other / "gone") == other / "gone"
    (other / "study.yaml").touch()
    with pytest.raises(UserError, match="run megaarch compare first"):
        run_folder(other / "gpt")


@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "a"], ["evaluate"], ["probe", "rank"]],
    ids=lambda command: command[0],
)
def test_every_command_that_opens_a_run_lists_a_studys_cells(command, study, capsys):
    assert main([*command, str(study)]) == 2
    assert f"\n  gpt: {study / GPT}\n" in capsys.readouterr().err
