"""TensorBoard and Weights & Biases (in place of which a module records what it is asked): one run
however often it is started, and no run that ends because a board fails."""

import json
import os
import signal
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaarch.distributed.mesh import Grid
from megaarch.training.metrics import Metrics
from megaarch.training.preemption import Stopped
from megaarch.training.trackers import ID
from megaarch.training.trainer import Trainer
from tests.distributed.pool import Pool

pytestmark = pytest.mark.slow


class Server:
    """The module `wandb`, and what its server holds: by id, each start's arguments, the
    configuration and the steps that were drawn, each of which it takes once and in order."""

    def __init__(self, breaks=""):
        self.runs, self.breaks = {}, breaks

    def init(self, *, id, resume, config, **given):
        self._break("init")
        assert resume == "allow"
        run = self.runs.setdefault(id, Run(self))
        run.starts.append(given)
        for name, value in config.items():
            run.config.setdefault(name, value)  # an older value stays, as with W&B
        run.ends = False
        return run

    def _break(self, where):
        if where == self.breaks:
            raise RuntimeError(f"{where}: no connection\nand much more")


class Config(dict):
    def update(self, values, allow_val_change=False):
        assert allow_val_change or all(self.get(k, v) == v for k, v in values.items())
        super().update(values)


class Run:
    def __init__(self, server):
        self.server, self.starts, self.config, self.steps, self.ends = (
            server,
            [],
            Config(),
            {},
            False,
        )

    def log(self, numbers, step):
        self.server._break("log")
        if step > max(self.steps, default=0):
            self.steps[step] = numbers

    def finish(self):
        self.server._break("finish")
        self.ends = True


def serve(patch, **given):
    server = Server(**given)
    module = types.ModuleType("wandb")
    module.init = server.init
    patch.setitem(sys.modules, "wandb", module)
    return server


@pytest.fixture
def wandb(monkeypatch):
    return serve(monkeypatch)


def stop_at(settings, prepared, step):
    """Trains until it is told to stop at `step`, as near a time limit."""
    trainer = Trainer(settings, prepared)
    trainer.watch = lambda s: s.progress.step == step and os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Stopped):
        trainer.run()


def lines(tmp_path, run="run"):
    text = (tmp_path / run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_all_starts_of_a_run_are_one_run_of_wandb(tiny, prepared, tmp_path, wandb):
    given = tiny(logging__wandb=True)
    dying = Trainer(given, prepared)  # before its first checkpoint
    dying.watch = lambda step: 1 / (step.progress.step - 2)
    with pytest.raises(ZeroDivisionError):
        dying.run()
    stop_at(given, prepared, 3)
    stop_at(given, prepared, 5)
    longer = tiny(logging__wandb=True, training__steps=8)
    Trainer(longer, prepared).run()
    ((name, run),) = wandb.runs.items()
    assert len(run.starts) == 4 and run.ends
    assert run.starts[0] == run.starts[-1]
    assert run.starts[0]["name"] == "run" and run.starts[0]["dir"] == str(tmp_path / "run")
    assert sorted(run.steps) == [1, 2, 3, 4, 5, 6, 7, 8]
    for line in lines(tmp_path)[2:]:
        assert run.steps[line["step"]]["loss"] == line["loss"]
    assert run.config == longer.model_dump(mode="json")  # as it runs now, not as it began
    assert (tmp_path / "run" / ID).read_text() == f"{name}\n"
    Trainer(tiny(logging__wandb=True, logging__directory=str(tmp_path / "other")), prepared).run()
    assert len(wandb.runs) == 2


def test_a_cell_of_a_study_has_a_name_of_its_own_in_wandb(tiny, prepared, tmp_path, wandb):
    """Cells of one size, budget and seed share the last part of their folders."""
    for name in ("gpt", "t5"):
        folder = tmp_path / "mine" / "cells" / name / "base-1e+09-seed0"
        Trainer(tiny(logging__wandb=True, logging__directory=str(folder)), prepared).run()
    names = [run.starts[0]["name"] for run in wandb.runs.values()]
    assert names == ["mine/gpt/base-1e+09-seed0", "mine/t5/base-1e+09-seed0"]


@pytest.mark.parametrize(
    "damage", ["", "\0" * 17, "a b", "../run", "id\nid", "Ü", "\udcff", "x" * 65, "x" * 2000]
)
def test_a_damaged_id_is_a_new_run_and_then_kept(damage, tiny, tmp_path, wandb, caplog):
    given = tiny(logging__wandb=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ID).write_bytes(damage.encode(errors="surrogateescape"))
    (tmp_path / "run" / "wandb.tmp").write_text("half")  # of a start that was killed
    for _ in range(2):
        Metrics(given.logging, 0, {}).close()
    ((name, run),) = wandb.runs.items()
    assert len(run.starts) == 2 and name.isalnum() and name.isascii()
    assert caplog.text.count("wandb.id is damaged") == 1


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_a_run_goes_on_where_wandb_fails(breaks, tiny, prepared, tmp_path, monkeypatch, caplog):
    server = serve(monkeypatch, breaks=breaks)
    Trainer(tiny(logging__wandb=True, logging__tensorboard=True), prepared).run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    said = [r.getMessage() for r in caplog.records if "Weights & Biases" in r.getMessage()]
    assert said == [
        f"Weights & Biases fails (RuntimeError: {breaks}: no connection): the run goes on without "
        "it, and metrics.jsonl has every step"
    ]
    assert sum(len(run.steps) for run in server.runs.values()) == (6 if breaks == "finish" else 0)
    assert drawn(tmp_path) == [1, 2, 3, 4, 5, 6]  # the other board is not touched


def test_a_wandb_that_cannot_be_imported_ends_no_run_and_none_at_all_is_a_mistake(
    tiny, prepared, tmp_path, monkeypatch, caplog
):
    given = tiny(logging__wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging\.wandb: .* is not installed: pip install wandb"):
        Trainer(given, prepared).run()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb.py").write_text("import a_part_of_wandb_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    Trainer(given, prepared).run()
    assert "fails (ModuleNotFoundError: No module named 'a_part_of_wandb" in caplog.text
    assert len(lines(tmp_path)) == 6


def count_starts(settings, prepared):
    """Starts of W&B by a run of several processes, on this one."""
    with pytest.MonkeyPatch.context() as patch:
        server = serve(patch)
        Trainer(settings, prepared, grid=Grid.build(settings.parallel, "cpu")).run()
        return sum(len(run.starts) for run in server.runs.values())


def test_of_several_processes_the_main_one_alone_draws(tiny, prepared):
    given = tiny(logging__wandb=True, training__steps=2, parallel__data_parallel_shard=2)
    assert Pool().run(2, count_starts, given, prepared) == [1, 0]


def drawn(tmp_path):
    """Steps whose loss TensorBoard shows."""
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    return [event.step for event in read.Scalars("loss")]


def test_tensorboard_drops_what_is_cut_and_draws_it_once(tiny, prepared, tmp_path):
    given = tiny(logging__tensorboard=True, training__save_every=2)
    dying = Trainer(given, prepared)
    dying.watch = lambda step: 1 / (step.progress.step - 5)
    with pytest.raises(ZeroDivisionError):
        dying.run()
    assert drawn(tmp_path) == [1, 2, 3, 4, 5]
    continued = Metrics(given.logging, 4, {})
    continued.close()
    assert drawn(tmp_path) == [1, 2, 3, 4]
    Trainer(given, prepared).run()
    assert drawn(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_without_a_tensorboard_that_cannot_start(tiny, prepared, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file")
    Trainer(tiny(logging__tensorboard=True), prepared).run()
    assert "TensorBoard fails (FileExistsError" in caplog.text
    assert len(lines(tmp_path)) == 6
