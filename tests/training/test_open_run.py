"""Which run a path names: its own folder, or STUDY/CELL."""

import json
from pathlib import Path

import pytest
import torch

from megaarch.checkpoint import checkpoint
from megaarch.cli.main import main
from megaarch.errors import UserError
from megaarch.files import size_and_checksum
from megaarch.parallel import float8
from megaarch.training.open_run import open_run, run_folder
from megaarch.training.trainer import Trainer

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
        ("t5", "names 2 runs of the study", (LARGE, SMALL)),
        ("gtp", "names no runs of the study", (GPT, LARGE, SMALL)),
        ("cells/t5/../gtp", "names no runs of the study", (GPT, LARGE, SMALL)),
    ],
)
def test_a_path_that_names_no_one_run_lists_them(given, what, listed, study):
    with pytest.raises(UserError, match=what) as caught:
        run_folder(study / given)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [f"  {study / run}" for run in listed]


def test_a_study_that_has_not_begun_and_what_lies_in_none(study, tmp_path_factory):
    (other := tmp_path_factory.mktemp("other") / "study").mkdir()
    assert run_folder(other) == other and run_folder(other / "gone") == other / "gone"
    (other / "study.yaml").touch()
    assert run_folder(other / "gone") == other / "gone"  # a configuration of that name
    (other / "cells").mkdir()
    with pytest.raises(UserError, match="none has a complete checkpoint yet"):
        run_folder(other)


def test_a_cell_that_is_still_training_says_so(study):
    with pytest.raises(UserError, match="bert.* has no complete checkpoint yet: megaarch status"):
        run_folder(study / "bert")


def test_a_seed_is_not_taken_for_the_others_that_still_train(study):
    (study / GPT.replace("seed0", "seed1")).mkdir()
    with pytest.raises(UserError, match="names 2 runs of the study"):
        run_folder(study / "gpt")


def test_a_link_and_a_folder_within_a_study_name_its_cell(study, tmp_path_factory, monkeypatch):
    link = tmp_path_factory.mktemp("links") / "mine"
    link.symlink_to(study / "cells" / "gpt")
    assert run_folder(link) == study / GPT
    monkeypatch.chdir(study / "cells")
    assert run_folder(Path("gpt")) == Path("gpt") / Path(GPT).name


@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "a"], ["evaluate"], ["probe", "rank"]],
    ids=lambda command: command[0],
)
def test_every_command_that_opens_a_run_lists_a_studys_cells(command, study, capsys):
    assert main([*command, str(study)]) == 2
    assert f"\n  {study / GPT}\n" in capsys.readouterr().err


def test_a_checkpoint_of_a_run_is_opened_and_not_the_newest(tiny, prepared, tmp_path):
    settings = tiny("gpt", training__steps=4, training__save_every=2)
    Trainer(settings, prepared).run()
    run = tmp_path / "run"
    given = run / "checkpoints" / "step-00000002"
    assert run_folder(given) == given
    older, newest = open_run(given), open_run(run)
    assert (older.record.progress.step, newest.record.progress.step) == (2, 4)
    stored = checkpoint.read_weights(given)
    kept = older.engine.model.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in stored.items())
    assert main(["evaluate", str(given), "--set", "study.evaluation.middles=0"]) == 0
    assert main(["generate", str(given), "--prompt", "The river", "--max-tokens", "2"]) == 0
    assert main(["probe", "rank", str(given)]) == 0


RECORD, MANIFEST = "progress.json", "manifest.json"


def rewrite(run, section, **values):
    """Changes settings in the record of a run's newest checkpoint, as if it had been trained with these."""
    path = checkpoint.newest(run)
    record, listed = (json.loads((path / name).read_text()) for name in (RECORD, MANIFEST))
    record["settings"][section] |= values
    (path / RECORD).write_text(json.dumps(record))
    listed[RECORD] = size_and_checksum(path / RECORD)
    (path / MANIFEST).write_text(json.dumps(listed))


def test_a_run_that_traced_other_ranks_is_opened_by_one(tiny, prepared, tmp_path):
    Trainer(tiny(training__steps=1), prepared).run()
    rewrite(tmp_path / "run", "logging", profile_from=2, profile_ranks=[5])
    assert open_run(tmp_path / "run").record.settings.logging["profile_ranks"] == [5]


def test_a_run_of_float8_is_opened_with_torchao_or_without_float8(
    tiny, prepared, tmp_path, monkeypatch
):
    given = {"precision": "bf16", "float8": "tensorwise", "float8_emulate": True, "steps": 1}
    Trainer(tiny(**{f"training__{name}": v for name, v in given.items()}), prepared).run()
    rewrite(tmp_path / "run", "training", float8_emulate=False)
    open_run(tmp_path / "run")  # a CPU multiplies it too
    monkeypatch.setattr(float8, "version", lambda package: "0.1")
    with pytest.raises(UserError, match="tensorwise needs torchao 0.18 or newer, and 0.1 is"):
        open_run(tmp_path / "run")
    open_run(tmp_path / "run", ["training.float8=null"])
