"""One training step on fake CUDA tensors, from the copies of its batch to the figures that the host
reads of it: by a `Trainer`, so that it counts whatever stands behind it today."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from megaarch import config
from megaarch.config.catalogue import ARCHITECTURES
from megaarch.config.schema import Settings
from megaarch.data.batch import Counts
from megaarch.distributed.mesh import Grid
from megaarch.engine.native import NativeEngine
from megaarch.ingest.prepare import prepare
from megaarch.kernels import bindings
from megaarch.model import padded_vocabulary
from megaarch.parallel.parallelize import build_on_meta
from megaarch.training import trainer
from megaarch.training.steps_in_flight import PendingTotals
from megaarch.training.trainer import Trainer
from tests.fake_cuda import host, inductor
from tests.fake_cuda.device import pretended
from tests.fake_cuda.record import Recorder, phase

CONFIGURATION = "configs/benchmark.yaml"
TWO_STACKS = {"encoder_layers": 11, "decoder_layers": 11}  # 1.3 B parameters, as that file says
NUMBER = 2  # of the step whose batches are taken


@dataclass(frozen=True)
class Step:
    """What one step ran, and what its batches hold. plans: of the graphs that were compiled."""

    settings: Settings
    counts: Counts
    recorder: Recorder
    plans: tuple[inductor.Plan, ...]


def benchmark(preset: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings of `megaarch benchmark train configs/benchmark.yaml`, on a GPU."""
    raw = {name: dict(section) for name, section in config.read_yaml(CONFIGURATION).items()}
    raw["model"]["preset"] = preset
    raw["training"] |= {"steps": 1 << 30, "schedule": "constant", "device": "cpu"}
    filled = config.fill_preset(raw)
    if len(ARCHITECTURES[filled["model"]["architecture"]].streams) > 1:
        filled["model"] |= TWO_STACKS
    for override in overrides:
        config.set_path(filled, *config.parse_override(override))
    return config.resolve(filled)


def run(settings: Settings) -> Step:
    """Records a step that is not the optimizer's first: its state is there."""
    recorder = Recorder(padded_vocabulary(settings.model.vocabulary_size))
    with pretended() as mode, host.answered(recorder), inductor.stand_in() as compiler:
        with unset_fake_temporarily():
            trainer = _trainer(settings, mode)
            batches = [batch.pin_memory() for batch in trainer.steps[NUMBER]]  # as the loader does
            total = PendingTotals(batches, trainer.grid)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        compiler.recorder = recorder
        with _recorded(recorder, trainer):
            trainer.train_step(batches, total)
            with phase(recorder, "read"):
                trainer.read()
    counts = [batch.counts for batch in batches]
    return Step(settings, sum(counts[1:], counts[0]), recorder, tuple(compiler.plans))


def _trainer(settings: Settings, mode: FakeTensorMode) -> Trainer:
    """The trainer of a run that begins, its model built on meta as in any layout and then given
    memory that is fake."""

    def build_engine(settings: Settings, grid: Grid) -> NativeEngine:
        engine = NativeEngine(settings, grid, model=build_on_meta(settings, grid))
        with mode:
            engine.model.to_empty(device=grid.device)
        return engine

    prepared = prepare(settings.data, settings.model.vocabulary_size)
    with (
        TemporaryDirectory() as folder,
        mock.patch.object(trainer, "build_engine", build_engine),
        mock.patch.object(bindings, "obstacle", lambda device_type: None),  # fakes run no kernel
    ):
        logging = settings.logging.model_copy(update={"directory": folder})
        settings = settings.model_copy(update={"logging": logging})
        return Trainer(settings, prepared, grid=Grid.single("cuda:0"))


@contextmanager
def _recorded(recorder: Recorder, trainer: Trainer) -> Iterator[None]:
    """Recorded, with copies of the batch, clipping and the optimizer's own step as phases."""
    engine, stepping, blocks = trainer.engine, trainer.optimizer, []
    for name, at in (("_local", "copy"), ("update", "clip")):
        setattr(engine, name, _as_phase(recorder, at, getattr(engine, name)))

    def begin(*_):
        blocks.append(phase(recorder, "optimizer"))
        blocks[-1].__enter__()

    def end(*_):
        blocks.pop().__exit__(None, None, None)

    hooks = stepping.register_step_pre_hook(begin), stepping.register_step_post_hook(end)
    try:
        with recorder:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _as_phase(recorder: Recorder, name: str, function: Callable) -> Callable:
    def run(*given):
        with phase(recorder, name):
            return function(*given)

    return run
