"""One training step on fake CUDA tensors: forward, backward, clipping, optimizer, by what the trainer
calls (`Replica` and `Steps`), so that it counts whatever stands behind them today."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megaarch import config
from megaarch.catalogue import ARCHITECTURES
from megaarch.data.batch import Counts
from megaarch.data.loader import Steps
from megaarch.data.prepare import prepare
from megaarch.data.rows import Rows
from megaarch.model import padded_vocabulary
from megaarch.parallel.build import place
from megaarch.parallel.mesh import Grid
from megaarch.parallel.replica import Replica
from megaarch.settings import Settings
from megaarch.training import optimizer
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
    batches = _steps(settings)[NUMBER]
    recorder = Recorder(padded_vocabulary(settings.model.vocabulary_size))
    with pretended(), host.answered(), inductor.stand_in() as compiler:
        replica = _replica(settings)
        stepping = replica.adopt(optimizer.build(replica.model, settings.training))
        for parameter in replica.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        stepping.step()
        stepping.zero_grad()
        compiler.recorder = recorder
        with _recorded(recorder, stepping):
            _step(replica, stepping, batches, recorder)
    counts = [batch.counts for batch in batches]
    return Step(settings, sum(counts[1:], counts[0]), recorder, tuple(compiler.plans))


def _replica(settings: Settings) -> Replica:
    """Built on meta as in any layout, then given memory that is fake."""
    grid = Grid.single("cuda:0")
    with unset_fake_temporarily():
        replica = Replica(settings, grid, model=place(settings, grid))
    replica.model.to_empty(device=grid.device)
    replica.train()
    return replica


def _steps(settings: Settings) -> Steps:
    training, model = settings.training, settings.model
    prepared = prepare(settings.data, model.vocabulary_size)
    return Steps(
        Rows(model, settings.data, prepared, training.seed),
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        device_type="cuda",
        kernel=model.attention,
        fused_rows="rows" in model.fused_kernels,
    )


def _step(replica, stepping: torch.optim.Optimizer, batches, recorder: Recorder):
    with unset_fake_temporarily():
        weight = float(sum(batch.target_weights.sum() for batch in batches))
    replica.model.set_dropout_step(replica.settings.training.seed, 0)
    with phase(recorder, "copy"):
        batches = [batch.to(replica.grid.device) for batch in batches]
    loss = replica.forward_backward(batches, weight)
    with phase(recorder, "clip"):
        replica.update(stepping, loss)


@contextmanager
def _recorded(recorder: Recorder, stepping: torch.optim.Optimizer) -> Iterator[None]:
    """Recorded, with the optimizer's own step as a phase of its own."""
    blocks = []

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
