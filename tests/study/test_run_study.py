"""A study end to end: equal compute, what is finished stays, what is new runs, what changed is
named."""

import copy
import io
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megaarch import config, report
from megaarch.cli.main import main
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.evaluation.scorer import Scores
from megaarch.probes import catalogue
from megaarch.report.merged_cells import merged_cells
from megaarch.report.warnings import warnings_for
from megaarch.study import distributed_cell, lock, run_cell, workers
from megaarch.study import folder as study_folder
from megaarch.study import run_study as study_module
from megaarch.study.costs import dry_run
from megaarch.study.distributed_cell import run_trial
from megaarch.study.evaluate_run import evaluate_run
from megaarch.study.progress_bar import ProgressBar
from megaarch.study.results import CellRecord, Results
from megaarch.study.sweep_grid import BATCH, RATE, SHARE
from megaarch.training.preemption import Stopped
from megaarch.training.trainer import Trainer
from tests.study.example_results import example_cell
from tests.study.small_study import EVALUATION, small_study

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)


def compare(*given):
    return study_module.compare(*given).as_json()


def lowercase_words(study):
    """Ids of the commonest words of a study's text."""
    text = Path(study["data"]["source"]).read_text().lower()
    text = " ".join(json.loads(line)["text"] for line in text.splitlines())
    return {word: i for i, (word, _) in enumerate(Counter(text.split()).most_common(400), 1)}


@pytest.fixture
def study(raw):
    cells = [
        {"name": "gpt", "preset": "gpt"},
        {"name": "t5", "preset": "t5"},
        {"name": "adapted", "preset": "prefix_lm", "from": "gpt", "budget": 6e8},
    ]
    return small_study(raw, cells, evaluation=EVALUATION | {"points": 8})


def test_results_have_what_the_report_and_its_readers_rely_on(study, tmp_path):
    results = compare(study, tmp_path, QUIET)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    gpt, t5, adapted = results["cells"]
    for cell, budget in ((gpt, 1.2e9), (t5, 1.2e9), (adapted, 6e8)):
        assert abs(cell["flops"] / budget - 1) < 0.5 / cell["steps"] + 0.01
        assert len(cell["curve"]) >= 8 and cell["curve"][0]["step"] == 0
        assert cell["curve"][-1]["step"] == cell["steps"]
        assert all({"step", "flops", "seconds", "heldout"} <= set(point) for point in cell["curve"])
        for key in [
            "name",
            "architecture",
            "objective",
            "parameters",
            "flops",
            "palm_flops",
            "seen_tokens",
            "target_tokens",
            "steps",
            "train_seconds",
            "tokens_per_second",
            "final_loss",
            "heldout",
            "curve",
        ]:
            assert key in cell
        assert {"continuation_bits_per_byte", "comparable", "choice_accuracy"} <= set(
            cell["heldout"]
        )
        scored = cell["heldout"]["paired"]  # on the items of the unigram model
        of_unigram = results["unigram_paired"]
        assert all(scored[key] == of_unigram[key] for key in ("documents", "sizes"))
        assert len(of_unigram["amounts"]) == 6
    spent = sum(results["unigram_paired"]["amounts"]) / sum(results["unigram_paired"]["sizes"])
    assert results["unigram_bits_per_byte"] == pytest.approx(spent, abs=1e-3)
    assert adapted["parent"] == gpt["key"]
    assert adapted["inherited_flops"] == gpt["flops"] and gpt["inherited_flops"] == 0
    assert adapted["curve"][0]["heldout"] != gpt["curve"][0]["heldout"]
    for write in (report.text, report.csv, report.latex):
        assert "adapted" in write(results)


def test_probes_of_a_study_say_which_runs_they_saw(study, tmp_path):
    del study["study"]["cells"][1:]
    study["study"]["seeds"] = [0, 1]
    results = Results.of(compare(study, tmp_path, QUIET))
    assert main(["probe", "dialogue", "--study", str(tmp_path)]) == 0
    [cell] = merged_cells(results)
    found = catalogue.read(tmp_path)["dialogue"]
    assert len(set(cell.digests)) == 2
    assert found.digests == {"gpt/base-1.2e+09": cell.digests}
    assert found.of_cell(cell.name, cell.key, cell.digests) is not None


def test_an_adapted_study_links_each_child_to_its_parent_and_names_what_is_not(study, tmp_path):
    study["study"]["cells"] = [{"name": name, "preset": name} for name in ("gpt", "t5", "bert")]
    study["study"]["adapt"] = {"budget": 6e8}
    shown = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    results = compare(study, tmp_path, shown)
    left_out = "bert is not adapted (study.adapt): the architecture encoder does not run prefix_lm."
    assert left_out in shown.export_text() and left_out in results["warnings"]
    cells = {cell["name"]: cell for cell in results["cells"]}
    assert set(cells) == {"gpt", "t5", "bert", "gpt-adapted", "t5-adapted"}
    for name, objective in (("gpt", "full_lm"), ("t5", "prefix_lm")):
        parent, child = cells[name], cells[f"{name}-adapted"]
        assert (child["parent"], child["adaptation"]) == (parent["key"], 6e8)
        assert (child["objective"], parent["adaptation"]) == (objective, None)
        assert abs(child["flops"] / 6e8 - 1) < 0.5 / child["steps"] + 0.01
        assert child["inherited_flops"] == parent["flops"]
        assert child["inherited_tokens"] == parent["seen_tokens"]
        before, after = (c["heldout"]["continuation_bits_per_byte"] for c in (parent, child))
        assert f"{before:.3f} -> {after:.3f}" in report.text(results)
    again = compare(study, tmp_path, QUIET)  # all is finished
    assert again["cells"] == results["cells"]


def test_a_cell_that_takes_the_optimizer_along_goes_on_where_its_parent_ended(study, tmp_path):
    """Its budget is what it adds, and so are its counts; curve and losses are of its own compute."""
    along = {"training.start_optimizer": True, "training.schedule": "wsd"}
    study["training"]["schedule"] = "constant"
    study["study"]["cells"] = [
        {"name": "gpt", "preset": "gpt"},
        {"name": "more", "preset": "gpt", "from": "gpt", "budget": 6e8, "set": along},
        {"name": "most", "preset": "gpt", "from": "more", "budget": 6e8, "set": along},
    ]
    planned = [int(line.split()[1]) for line in dry_run(study, tmp_path).splitlines()[1:4]]
    gpt, more, most = compare(study, tmp_path, QUIET)["cells"]
    assert more["inherited_flops"] == gpt["flops"]
    assert most["inherited_flops"] == gpt["flops"] + more["flops"]
    assert most["inherited_tokens"] == gpt["seen_tokens"] + more["seen_tokens"]
    before = gpt
    for cell, steps in zip((more, most), planned[1:], strict=True):
        assert abs(cell["flops"] / 6e8 - 1) < 0.5 / cell["steps"] + 0.01
        assert abs(cell["steps"] - steps) <= 1
        begin, end = cell["curve"][0], cell["curve"][-1]
        assert begin["heldout"] == before["curve"][-1]["heldout"]
        assert (begin["flops"], begin["seconds"]) == (0, 0)
        assert (begin["step"], end["step"]) == (
            before["curve"][-1]["step"],
            before["curve"][-1]["step"] + cell["steps"],
        )
        assert end["flops"] == cell["losses"][-1]["flops"] == cell["flops"]
        before = cell


def test_only_new_cells_run_and_a_changed_one_is_named(study, tmp_path, monkeypatch):
    compare(study, tmp_path, QUIET)
    ran = []
    honest = run_cell.run
    monkeypatch.setattr(run_cell, "run", lambda s: ran.append(s.cell.key) or honest(s))
    study["study"]["seeds"] = [0, 1]
    study["study"]["cells"] = study["study"]["cells"][:2]
    compare(study, tmp_path, QUIET)
    assert ran == ["gpt/base-1.2e+09-seed1", "t5/base-1.2e+09-seed1"]
    study["training"]["clip_gradient"] = 0.7
    with pytest.raises(config.ConfigError, match=r"clip_gradient was 1.0 and is 0.7"):
        compare(study, tmp_path, QUIET)


def test_a_finished_cell_is_scored_anew_without_its_record_and_not_trained_again(study, tmp_path):
    """The advice on another yardstick was to remove the cell's folder, and the trained weights with it."""
    del study["study"]["cells"][1]
    before = compare(study, tmp_path, QUIET)["cells"]
    steps = {path: path.read_bytes() for path in tmp_path.glob("cells/*/*/metrics.jsonl")}
    study["study"]["evaluation"]["choices"] = 4
    with pytest.raises(config.ConfigError, match=r"or remove .*seed0/cell.json: its weights stay"):
        compare(study, tmp_path, QUIET)
    for record in tmp_path.glob("cells/*/*/cell.json"):
        record.unlink()
    after = compare(study, tmp_path, QUIET)["cells"]
    assert len(steps) == 2 and all(path.read_bytes() == step for path, step in steps.items())
    assert [cell["heldout"]["items"]["choice"] for cell in after] == [4, 4]
    for cell, was in zip(after, before, strict=True):
        assert cell["curve"] == was["curve"] and cell["flops"] == was["flops"]
        assert cell["heldout"]["paired"] == was["heldout"]["paired"]
    study["study"]["evaluation"]["curve_documents"] = 3  # the curve's points stay what they were
    with pytest.raises(config.ConfigError, match=r"or remove its folder .*seed0$"):
        compare(study, tmp_path, QUIET)


def test_a_cell_that_another_version_scored_on_other_items_is_named(study, tmp_path):
    """Nothing of a cell's settings tells which items a version cuts of a text."""
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["seeds"] = [0, 1, 2]
    assert not [w for w in compare(study, tmp_path, QUIET)["warnings"] if "other held-out" in w]
    path = tmp_path / "cells/gpt/base-1.2e+09-seed1/cell.json"
    record = json.loads(path.read_text())
    record["result"]["heldout"]["paired"]["sizes"][0] += 1
    path.write_text(json.dumps(record))
    found = [w for w in compare(study, tmp_path, QUIET)["warnings"] if "other held-out" in w]
    assert found == [
        "Scored on other held-out items than the rest, by another version: gpt/base-1.2e+09-seed1."
    ]


def test_a_child_whose_parent_has_changed_is_named_and_not_kept(study, tmp_path):
    """Parent, child and grandchild stand as they would in the folder when finished."""
    chain = [("gpt", None), ("adapted", "gpt"), ("again", "adapted")]
    study["study"]["cells"] = [
        {"name": name, "preset": "gpt"} | ({"from": origin} if origin else {})
        for name, origin in chain
    ]

    def opened_study():
        return study_folder.StudyFolder.open(study, tmp_path)

    def finish(cell):
        signature = opened_study().identity(cell)
        CellRecord(signature=signature, result=example_cell("gpt")).write(cell.folder)

    for cell in opened_study().cells:
        finish(cell)
    assert all(map(opened_study().finished, opened_study().cells))
    study["study"]["cells"][0]["set"] = {"training.clip_gradient": 0.7}
    parent, child, _ = opened_study().cells
    shutil.rmtree(parent.folder)
    assert opened_study().finished(child) is None, "nothing is known of its parent"
    with pytest.raises(config.ConfigError, match=r"adapted.*from.training.clip_gradient was 1.0"):
        compare(study, tmp_path, QUIET)  # told before the parent is run again
    assert not parent.folder.exists()
    finish(parent)
    with pytest.raises(config.ConfigError, match="from.training.clip_gradient was 1.0 and is 0.7"):
        opened_study().finished(child)


def test_an_interrupted_cell_continues_to_the_same_result(study, tmp_path, monkeypatch):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["training"]["save_every"] = 3
    whole = compare(study, tmp_path / "whole", QUIET)["cells"][0]
    honest = Trainer.train_step

    def interrupted(self, *given):
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return honest(self, *given)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(study, tmp_path / "part", QUIET)
    monkeypatch.setattr(Trainer, "train_step", honest)
    part = compare(study, tmp_path / "part", QUIET)["cells"][0]
    for key in ("steps", "flops", "final_loss", "seen_tokens"):
        assert part[key] == whole[key]
    assert part["heldout"] == whole["heldout"]
    assert [p["heldout"] for p in part["curve"]] == [p["heldout"] for p in whole["curve"]]


@pytest.mark.parametrize("tune", [None, {"learning_rates": [1e-3], "budget": 0.5}])
def test_a_signal_in_a_cells_last_save_stops_the_study_ahead_of_scoring(
    tune, study, tmp_path, monkeypatch
):
    study["study"] |= {"cells": study["study"]["cells"][:1], "tune": tune}
    honest, saved = Trainer.save, []

    def save(self, wait=True):
        if not saved:
            os.kill(os.getpid(), signal.SIGUSR1)
        honest(self, wait)
        saved.append(self.progress.step)

    monkeypatch.setattr(Trainer, "save", save)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(Stopped) as caught:
            compare(study, tmp_path, QUIET)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert saved == [caught.value.step]
    assert compare(study, tmp_path, QUIET)["cells"][0]["heldout"]
    assert saved[1] == saved[0], "it went on behind its last step"


def test_a_sweep_chooses_rates_and_flags_an_optimum_at_the_edge(study, tmp_path):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["tune"] = {"learning_rates": [1e-5, 1e-3], "budget": 0.5}
    results = compare(study, tmp_path / "sweep", QUIET)
    cell = results["cells"][0]
    assert cell["learning_rate"] == 1e-3 and cell["tuned"] and cell["learning_rate_at_edge"]
    assert [trial["learning_rate"] for trial in results["tuning"]] == [1e-5, 1e-3]
    assert all(abs(t["flops"] / 0.6e9 - 1) < 0.2 for t in results["tuning"])
    [run] = (tmp_path / "sweep/cells").glob("*/*")
    trials = list(run.glob("tune/rate-*"))
    assert len(trials) == 2 and not any((trial / "checkpoints").exists() for trial in trials)
    assert (run / "checkpoints").exists()
    # its file serves another study on the same text
    del study["study"]["tune"]
    study["study"]["rates"] = str(tmp_path / "sweep" / "rates.json")
    again = compare(study, tmp_path / "again", QUIET)["cells"][0]
    assert again["learning_rate"] == 1e-3 and again["tuned"]
    study["study"]["rates"] = str(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="study.rates: cannot read"):
        compare(study, tmp_path / "x", QUIET)


def test_a_cell_with_a_rate_of_its_own_is_not_swept_and_not_called_tuned(study, tmp_path):
    study["study"]["cells"] = [
        {"name": "own", "preset": "gpt", "set": {"training.learning_rate": 2e-3}},
        {"name": "swept", "preset": "gpt"},
    ]
    study["study"]["tune"] = {"learning_rates": [1e-3, 2e-3], "budget": 0.5}
    results = compare(study, tmp_path, QUIET)
    own, swept = results["cells"]
    assert [trial["cell"] for trial in results["tuning"]] == ["swept", "swept"]
    assert swept["tuned"] and not own["tuned"] and own["learning_rate"] == 2e-3
    assert not (tmp_path / "cells" / own["key"] / "tune").exists()
    folder = study_folder.StudyFolder.open(study, tmp_path)
    assert distributed_cell._tuned(folder, folder.cells[0]).cells[0] == folder.cells[0]


def test_a_changed_setting_is_told_before_a_finished_sweep_is_run_again(
    study, tmp_path, monkeypatch
):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["tune"] = {"learning_rates": [1e-3], "budget": 0.5}
    done = compare(study, tmp_path, QUIET)
    monkeypatch.setattr(Trainer, "run", lambda *given, **more: pytest.fail("it trained"))
    changed = copy.deepcopy(study)
    changed["model"]["activation"] = "gelu"
    with pytest.raises(UserError, match="other settings: model.activation was 'swiglu' and is"):
        compare(changed, tmp_path, QUIET)
    assert compare(study, tmp_path, QUIET)["tuning"] == done["tuning"]


def test_a_trial_that_was_interrupted_continues_from_its_checkpoint(study, tmp_path, monkeypatch):
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["tune"] = {"learning_rates": [1e-3], "budget": 0.5}
    study["training"]["save_every"] = 2
    whole = compare(study, tmp_path / "whole", QUIET)["tuning"]
    honest, begun = Trainer.train_step, []

    def counted(self, *given):
        begun.append(self.progress.step)
        if self.progress.step == 3 and begun.count(3) == 1:
            raise KeyboardInterrupt
        return honest(self, *given)

    monkeypatch.setattr(Trainer, "train_step", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(study, tmp_path / "part", QUIET)
    assert compare(study, tmp_path / "part", QUIET)["tuning"] == whole
    assert begun[:5] == [0, 1, 2, 3, 2]
    [trial] = (tmp_path / "part/cells").glob("*/*/tune/rate-*")
    (trial / "checkpoints" / "step-00000002").mkdir(parents=True)  # killed ahead of the removal
    compare(study, tmp_path / "part", QUIET)
    assert not (trial / "checkpoints").exists()


def test_a_sweep_chooses_batches_and_depths_too(study, tmp_path):
    study["study"]["cells"] = [{"name": "t5", "preset": "t5"}]
    study["study"]["tune"] = {
        "learning_rates": [1e-3],
        "budget": 0.5,
        "encoder_shares": [0.25, 0.75],
    }
    study["study"]["tune"]["global_batch_tokens"] = [512, 1024]
    results = compare(study, tmp_path / "sweep", QUIET)
    assert len(results["tuning"]) == 4
    best = min(results["tuning"], key=lambda trial: trial["heldout"])["more"]
    for again in (False, True):
        [cell] = results["cells"]
        assert cell["tuned"] and sorted(cell["more_at_edge"]) == sorted([BATCH, SHARE])
        training, model = cell["settings"]["training"], cell["settings"]["model"]
        assert training["global_batch_tokens"] == best[BATCH]
        assert (model["encoder_layers"] > model["decoder_layers"]) == (best[SHARE] > 0.5)
        if not again:  # its file serves another study, and its report says where the best ones lie
            assert "Best choice at the edge of its grid" in " ".join(
                warnings_for(Results.model_validate(results))
            )
            del study["study"]["tune"]
            study["study"]["rates"] = str(tmp_path / "sweep" / "rates.json")
            results = compare(study, tmp_path / "again", QUIET)


def test_a_trial_is_scored_on_validation_items(study, tmp_path, monkeypatch):
    raw = copy.deepcopy(study)
    raw["study"]["cells"] = raw["study"]["cells"][:1]
    opened = study_folder.StudyFolder.open(raw, tmp_path)
    [cell] = opened.cells
    monkeypatch.setattr(run_cell.Trainer, "run", lambda trainer, more: trainer.progress)
    judged = []
    monkeypatch.setattr(
        run_cell.yardsticks, "continuation_bits", lambda scorer, items: judged.extend(items) or 2.5
    )
    bar = ProgressBar("trial", lambda *message: None)
    grid = Grid.single(torch.device("cpu"))
    setup = run_cell.Setup(opened, cell.trial({RATE: 1e-3}, 0.5), bar, grid)
    assert run_cell.trial(setup).trial.heldout == 2.5
    chosen = opened.held_out()["validation"][: opened.study.evaluation.documents]
    assert [item.document for item in judged] == [item.document for item in chosen]


def test_a_trial_that_nothing_can_score_is_refused_before_it_trains(study, tmp_path, monkeypatch):
    """As a job of its own, which looks at no cell ahead."""
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["tune"] = {"learning_rates": [1e-3], "budget": 0.5}
    study["study"]["evaluation"]["prefix_tokens"] = 10**6
    monkeypatch.setattr(run_cell.Trainer, "run", lambda *given, **more: pytest.fail("it trained"))
    with pytest.raises(UserError, match="no held-out document has 1000006 tokens"):
        run_trial(study, tmp_path, 0)


def test_a_trial_of_pairs_is_scored_on_their_own_held_out_targets(study, tmp_path, monkeypatch):
    """Text would choose the rate that forgets least."""
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"input": f"what is {i}?", "target": f"it is {i}."} for i in range(300)]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    tuned = {"data.objective": "supervised", "data.source": str(pairs)}
    study["study"]["cells"] = [{"name": "tuned", "preset": "prefix_lm", "set": tuned}]
    opened = study_folder.StudyFolder.open(study, tmp_path / "s")
    [cell] = opened.cells
    monkeypatch.setattr(run_cell.Trainer, "run", lambda trainer, more: trainer.progress)
    scored = []
    monkeypatch.setattr(
        run_cell.Scorer,
        "loglikelihoods",
        lambda scorer, given: scored.extend(given) or Scores(*2 * [np.full(len(given), -1.0)]),
    )
    prepared = opened.text_of(cell)
    grid = Grid.single(torch.device("cpu"))
    bar = ProgressBar("trial", lambda *message: None)
    setup = run_cell.Setup(opened, cell.trial({RATE: 1e-3}, 0.5), bar, grid)
    found = run_cell.trial(setup)
    said = [tuple(prepared.tokenizer.decode(side).strip() for side in pair) for pair in scored]
    assert said == [tuple(pair) for pair in prepared.heldout_pairs] and len(said) > 5
    size = sum(len(target.encode()) for _, target in said)
    assert found.trial.heldout == pytest.approx(len(said) / size / np.log(2))
    # a trial that an earlier version scored on text is run again
    mark = dict(found.signature)
    del mark["validation"]
    found.model_copy(update={"signature": mark}).write(setup.cell.folder)
    run_cell.trial(setup)
    assert len(scored) == 2 * len(said)


def test_a_cell_can_be_finetuned_on_pairs_of_its_own(study, tmp_path, prepared):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for i in range(10):  # some fall on the train side
            leak = {"input": f"what is held out, {i}?", "target": prepared.heldout[0]}
            file.write(json.dumps(leak) + "\n")
        for i in range(200):
            pair = {"input": f"what is {i} and {i}?", "target": f"it is {2 * i}."}
            file.write(json.dumps(pair) + "\n")
        for i in range(50):
            long = {"input": f"what is {i}, " * 50, "target": f"it is {i}."}
            file.write(json.dumps(long) + "\n")
    study["study"]["cells"] = [
        {"name": "t5", "preset": "t5", "set": {"model.target_length": 24}},
        {
            "name": "finetuned",
            "preset": "t5",
            "from": "t5",
            "budget": 4e8,
            "set": {
                "data.objective": "supervised",
                "data.source": str(pairs),
                "model.target_length": 24,
                "model.dropout": 0.1,
            },
        },
    ]
    study["study"]["cells"].append(study["study"]["cells"][1] | {"name": "again"})
    console = Console(file=io.StringIO(), width=500)
    parent, child, _ = compare(study, tmp_path / "s", console)["cells"]
    [said] = [line for line in console.file.getvalue().splitlines() if "left out" in line]
    assert said.startswith(f"  finetuned, again train on {pairs}: ")
    assert child["objective"] == "supervised" and child["parent"] == parent["key"]
    assert child["data"]["excluded_documents"] > 5 and child["data"]["source"] == str(pairs)
    assert parent["data"]["excluded_documents"] == 0
    assert parent["truncated_share"] == 0 and 0.1 < child["truncated_share"] < 0.3
    assert child["losses"][-1]["loss"] < child["losses"][0]["loss"]
    # scored on the study's own held-out items, under its tokenizer
    sizes = [cell["heldout"]["paired"]["sizes"] for cell in (parent, child)]
    assert sizes[0] == sizes[1]


def test_tasks_that_a_cell_or_its_parent_trained_on_are_marked(study, tmp_path):
    items = "".join(f'{{"i": {i}, "label": {i % 2}}}\n' for i in range(200))
    for name in ("seen", "unseen"):
        for part in ("train", "test"):
            (tmp_path / f"{name}.{part}.jsonl").write_text(items)
        wording = {"name": "w", "prompt": "is {{ i }} odd? ||| {{ answer_choices[label] }}"}
        said = {
            "summary": "odd?",
            "data": {part: f"{name}.{part}.jsonl" for part in ("train", "test")},
            "wordings": [wording | {"choices": "no ||| yes"}],
        }
        (tmp_path / f"{name}.task.yaml").write_text(json.dumps(said))
    study["study"]["evaluation"] |= {"tasks": [str(tmp_path)], "task_items": 4}
    pairs = {"data.objective": "supervised", "data.source": str(tmp_path / "seen.task.yaml")}
    study["study"]["cells"] = [
        {"name": "raw", "preset": "gpt"},
        {"name": "tuned", "preset": "gpt", "from": "raw", "budget": 1e8, "set": pairs},
        {"name": "again", "preset": "gpt", "from": "tuned", "budget": 1e8},
    ]
    found = {cell["name"]: cell for cell in compare(study, tmp_path / "s", QUIET)["cells"]}
    marks = {
        name: {task: score["trained_on"] for task, score in cell["heldout"]["tasks"].items()}
        for name, cell in found.items()
    }
    assert marks["raw"] == {"seen": False, "unseen": False}
    assert marks["tuned"] == marks["again"] == {"seen": True, "unseen": False}
    of_tasks = [f"study.evaluation.tasks=[{tmp_path}]", "study.evaluation.task_items=4"]
    heldout, _ = evaluate_run(tmp_path / "s" / "again", of_tasks)
    assert {n: score.trained_on for n, score in heldout.tasks.items()} == marks["again"]


def test_all_cells_are_asked_what_the_one_with_least_room_holds(study, tmp_path, monkeypatch):
    """Rows of 48 hold two examples and a question, and those of an encoder with 32 lack the room. A cell that
    was scored in another room is named."""
    items = "".join(f'{{"i": {i}, "label": {i % 2}}}\n' for i in range(40))
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text(items)
    wording = {"name": "w", "prompt": "the river finds the stone near number {{ i }}? ||| "}
    wording["prompt"] += "{{ answer_choices[label] }}"
    said = {
        "summary": "odd?",
        "data": {part: f"{part}.jsonl" for part in ("train", "test")},
        "wordings": [wording | {"choices": "no ||| yes"}],
    }
    (tmp_path / "odd.task.yaml").write_text(json.dumps(said))
    more = {"tasks": [str(tmp_path / "odd.task.yaml")], "task_items": 4, "shots": 2, "points": 1}
    study["study"]["evaluation"] |= more
    gpt, t5, _ = study["study"]["cells"]
    t5["set"] = {"model.sequence_length": 32}
    study["study"] |= {"cells": [gpt, t5], "budgets": [2e8]}
    asked, honest = {}, run_cell.Scorer.loglikelihoods

    def spied(scorer, pairs):
        found = honest(scorer, pairs)
        prompts = [tuple(prompt) for prompt, _ in pairs]
        asked.setdefault(scorer.architecture, []).append(prompts)
        return found

    monkeypatch.setattr(run_cell.Scorer, "loglikelihoods", spied)
    results = compare(study, tmp_path / "s", QUIET)
    prompts = [each[-1] for each in asked.values()]  # the tasks come last
    assert len(prompts) == 2 and prompts[0] == prompts[1]
    shares = [cell["heldout"]["tasks"]["odd"]["shortened"] for cell in results["cells"]]
    assert shares == [1.0, 1.0]
    told = warnings_for(Results.model_validate(results))
    assert any("Prompts of tasks shortened" in warning for warning in told)
    study["study"]["cells"] = [gpt]  # whose room alone is another
    with pytest.raises(config.ConfigError, match=r"cell gpt.*study.evaluation.tasks.room was"):
        compare(study, tmp_path / "s", QUIET)


def test_lanes_give_what_one_after_another_gives(study, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = compare(study, tmp_path / "alone", QUIET)
        torch.set_num_threads(2)
        study["study"]["lanes"] = 2
        together = compare(study, tmp_path / "together", QUIET)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    # the last one, which waits for its parent, has half of the threads too, and no neighbour
    shares = [(c["environment"]["threads"], c["environment"]["lanes"]) for c in together["cells"]]
    assert shares == [(1, 2), (1, 2), (1, 1)]
    assert any("side by side" in warning for warning in warnings_for(Results.of(together)))
    assert not any("side by side" in warning for warning in warnings_for(Results.of(alone)))
    for a, b in zip(alone["cells"], together["cells"], strict=True):
        assert a["final_loss"] == b["final_loss"] and a["heldout"] == b["heldout"]


def test_a_cell_that_does_not_fit_into_memory_is_named(study, tmp_path, monkeypatch):
    def perform(folder, cell, show, **more):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        )

    monkeypatch.setattr(workers, "perform", perform)
    with pytest.raises(ValueError, match="cell gpt: out of memory"):
        compare(study, tmp_path, QUIET)


def test_a_folder_serves_one_process_at_a_time_and_damage_is_named(study, tmp_path):
    study["study"]["cells"] = study["study"]["cells"][:1]
    with lock.alone(tmp_path, "study"), pytest.raises(ValueError, match="another process"):
        compare(study, tmp_path, QUIET)
    compare(study, tmp_path, QUIET)
    record = next((tmp_path / "cells").rglob("cell.json"))
    record.write_text(record.read_text()[:50])
    with pytest.raises(ValueError, match=r"cell\.json is not JSON.*remove its folder"):
        compare(study, tmp_path, QUIET)


def test_a_study_without_choices_and_middles_has_a_report(study, tmp_path):
    """And one whose tokenizer drops case says that its figures stand alone."""
    words = Tokenizer(models.WordLevel({"<unk>": 0} | lowercase_words(study), "<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    study["data"]["tokenizer"] = str(tmp_path / "words.json")
    study["study"]["cells"] = study["study"]["cells"][:1]
    study["study"]["evaluation"] |= {"choices": 3, "middles": 0}
    results = compare(study, tmp_path, QUIET)
    assert report.write_page(results, tmp_path / "report.html").exists()
    assert "gpt" in report.text(results)
    assert "does not give held-out text back" in " ".join(report.text(results).split())
    Results.read(tmp_path / "results.json")
    with pytest.raises(ValueError, match="format"):
        Results.of({"format": 99})
