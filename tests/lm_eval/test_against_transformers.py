"""`lm_eval --model megaarch` on converted models equals `lm_eval --model hf` on their folders."""

import os
import shutil
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install '.[lm-eval]'")

from accelerate.state import AcceleratorState  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from megaarch.errors import UserError  # noqa: E402
from megaarch.interchange.convert import Conversion, convert  # noqa: E402
from megaarch.lm_eval.model import MegaarchLM  # noqa: E402  (registers the model)
from tests.lm_eval.local import FAMILIES, TASKS, write_pair, write_tasks  # noqa: E402

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Whatever other tests left: accelerate, which `--model hf` asks, would join a process group."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return write_pair(request.param, tmp_path_factory.mktemp("models"))


def evaluated(tasks, model, arguments, shots, batch_size):
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        num_fewshot=shots,
        batch_size=batch_size,
        device="cpu",
        task_manager=tasks,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("shots", [0, 2])
def test_every_output_type_equals_transformers(pair, tasks, shots):
    folder, run = pair
    theirs = evaluated(tasks, "hf", {"pretrained": str(folder), "dtype": "float32"}, shots, 1)
    ours = evaluated(tasks, "megaarch", {"run": str(run)}, shots, 5)
    assert ours["config"]["model_form"] == "hf"
    answers = []
    for name in TASKS:
        wanted, found = theirs["samples"][name], ours["samples"][name]
        assert [s["arguments"] for s in found] == [s["arguments"] for s in wanted]
        for a, b in zip(found, wanted, strict=True):
            for (one,), (other,) in zip(a["resps"], b["resps"], strict=True):
                if name == "local_answer":
                    assert one == other
                    answers.append(one)
                elif name == "local_rolling":
                    assert one == pytest.approx(other, abs=1e-4 * len(b["doc"]["long"]))
                else:
                    assert one[0] == pytest.approx(other[0], abs=1e-4)
                    assert one[1] == other[1]
        for metric in ("acc,none", "acc_norm,none", "exact_match,none"):
            assert ours["results"][name].get(metric) == theirs["results"][name].get(metric)
    assert len(set(answers)) > 2 and any(answers)


def test_a_continuation_that_no_row_holds_is_told(pair):
    _, run = pair
    form = MegaarchLM(run=str(run), max_length=16).form
    [made] = form.converted([5] * 40, [7] * 16)
    assert max(made.positions) <= 16 and len(made.target_index) == 16
    assert (made.target_index >= 0).all()
    if not form.separate:  # a decoder beside an encoder scores its end, as transformers' does
        with pytest.raises(UserError, match="17 tokens has no room in the model's 16"):
            form.converted([5], [7] * 17)


def test_a_model_in_the_hubs_cache_has_that_form_too(pair, tmp_path):
    """Its files are links to others that are named by their hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(pair[0].iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    job = Conversion(snapshot, tmp_path / "run", "checkpoint", sentinels=2, verify=False)
    convert(job)
    lm = MegaarchLM(run=str(tmp_path / "run"))
    assert lm.form.name == "hf"
    assert Path(lm.generator.tokenizer.path) == snapshot / "tokenizer.json"
