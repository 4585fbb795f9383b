"""The trainer: one run of one model, from the first step or a checkpoint to its limit.

A step: micro-batches from the loader, loss summed over their targets and divided by the target
weight of all of them (never a mean of means, so the result does not depend on how the rows are
split), gradients clipped, one optimizer step, one line of metrics.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaarch import catalogue, flops
from megaarch.data.batch import Batch
from megaarch.data.loader import Steps, prefetch
from megaarch.data.rows import Rows
from megaarch.model.initialize import initialize
from megaarch.model.transformer import Transformer
from megaarch.settings import Model, Settings
from megaarch.training import checkpoint, optimizer
from megaarch.training.metrics import Metrics
from megaarch.training.progress import Limit, Progress, learning_rate


@dataclass(frozen=True)
class Step:
    """What one step did. loss: nats a target. seconds: of this step. rate: learning rate."""

    progress: Progress
    share: float
    loss: float
    gradient_norm: float
    rate: float
    seconds: float
    tokens: int


def device_of(settings: Settings) -> torch.device:
    """The device that `training.device` names; auto is CUDA where there is one."""
    wanted = settings.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device: cuda is asked for and torch finds none; use cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def build_model(model: Model, objective: str) -> Transformer:
    """The Transformer of these settings, not yet initialized."""
    return Transformer(model, position_axes=catalogue.position_axes(objective))


class Trainer:
    """A run. `prepared` is the data (data/prepare.py); `fingerprint` guards a resumed run.

    watch: called after every step. hold_out: called with (model, progress) at `shares` of the
    limit, not counted as training time.
    """

    def __init__(
        self,
        settings: Settings,
        prepared,
        *,
        watch: Callable[[Step], None] = lambda step: None,
        hold_out: Callable[[Transformer, Progress], None] | None = None,
        shares: tuple[float, ...] = (),
    ):
        self.settings, self.watch = settings, watch
        self.hold_out, self.shares = hold_out, shares
        training = settings.training
        if training.threads:
            torch.set_num_threads(training.threads)
        if training.deterministic:
            torch.use_deterministic_algorithms(True)
        self.limit = Limit.of(training)
        self.device = device_of(settings)
        self.directory = Path(settings.logging.directory)
        self.rows = Rows(settings.model, settings.data, prepared, training.seed)
        self.steps = Steps(
            self.rows,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            device_type=self.device.type,
        )
        self.fingerprint = prepared.fingerprint
        self.model = build_model(settings.model, settings.data.objective)
        initialize(self.model, training.seed)
        self.model.to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = optimizer.build(self.model, training)
        self.progress = Progress()
        self._skipped_in_a_row = 0
        self._saved = -1
        self._start()
        if training.compile:
            for layer in self.model.layers.values():
                layer.compile()

    def _start(self) -> None:
        """Continue the newest checkpoint of this directory, or start from another's weights."""
        training = self.settings.training
        path = checkpoint.newest(self.directory) if training.resume else None
        if path is not None:
            saved = checkpoint.read_progress(path)
            if saved["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{path} was trained on other data: its fingerprint is {saved['fingerprint']} "
                    f"and this data's is {self.fingerprint}; restore the data or use another "
                    "logging.directory"
                )
            checkpoint.load(path, self.model, self.optimizer)
            self.progress = Progress.of(saved["progress"])
            self._saved = self.progress.step
        elif training.start_from:
            parent = Path(training.start_from)
            found = parent if (parent / "manifest.json").exists() else checkpoint.newest(parent)
            if found is None:
                raise ValueError(f"training.start_from: no complete checkpoint in {parent}")
            checkpoint.load(found, self.model, None)

    def run(self) -> Progress:
        """Train to the limit; returns the totals."""
        settings = self.settings
        metrics = Metrics(settings.logging, self.progress.step, settings.model_dump(mode="json"))
        try:
            if self.progress.step == 0:
                self._evaluate(-1.0)
            batches = prefetch(self.steps, self.progress.step, settings.data.workers)
            while not self.limit.reached(self.progress):
                before = self.limit.share(self.progress)
                step = self.train_step(next(batches))
                metrics.write(_line(step))
                self.watch(step)
                done = self.limit.reached(self.progress)
                self._evaluate(before, done)
                every = settings.training.save_every
                if every and self.progress.step % every == 0 and not done:
                    self.save()
            self.save()
        finally:
            metrics.close()
        return self.progress

    def _evaluate(self, before: float, done: bool = False) -> None:
        share = 1.0 if done else self.limit.share(self.progress)
        if self.hold_out and any(before < point <= share for point in self.shares):
            self.model.eval()
            with torch.no_grad(), self._autocast():
                self.hold_out(self.model, self.progress)

    def save(self) -> None:
        """A checkpoint of this moment, unless there is one."""
        if self._saved != self.progress.step:
            record = {
                "progress": asdict(self.progress),
                "fingerprint": self.fingerprint,
                "settings": self.settings.model_dump(mode="json", by_alias=True),
            }
            keep = self.settings.training.keep_checkpoints
            checkpoint.save(
                self.directory, self.progress.step, self.model, self.optimizer, record, keep
            )
            self._saved = self.progress.step

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.training.precision == "bf16"
        )

    def train_step(self, batches: list[Batch]) -> Step:
        """One optimizer step on these micro-batches."""
        training, model = self.settings.training, self.settings.model
        started = time.perf_counter()
        counts = sum((b.counts for b in batches[1:]), batches[0].counts)
        cost = flops.training(model, counts)
        palm = flops.palm(model, counts, self.parameters)
        after = self.progress.after(counts, flops=cost, palm_flops=palm, seconds=0.0, skipped=False)
        rate = learning_rate(training, after.step, self.limit.share(after))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.forward_backward(batches)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), training.clip_gradient or float("inf")
        )
        finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._guard(finite, batches)
        seconds = time.perf_counter() - started
        self.progress = self.progress.after(
            counts, flops=cost, palm_flops=palm, seconds=seconds, skipped=not finite
        )
        return Step(
            self.progress,
            self.limit.share(self.progress),
            float(loss),
            float(norm),
            rate,
            seconds,
            sum(counts.tokens),
        )

    def forward_backward(self, batches: list[Batch]) -> torch.Tensor:
        """Gradients of the mean loss over all targets of `batches`; returns that loss (nats a
        target, z-loss left out)."""
        z_loss = self.settings.training.z_loss
        total = max(float(sum(b.target_weights.sum() for b in batches)), 1e-8)
        self.model.train()
        self.model.set_dropout_step(self.settings.training.seed, self.progress.step)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            batch = batch.to(self.device)
            with self._autocast():
                out = self.model(batch)
            nll = (out.nll * batch.target_weights).sum() / total
            penalized = nll
            if z_loss:  # PaLM, Chowdhery et al. 2022, section 5
                square = out.log_partition.square() * batch.target_weights
                penalized = nll + z_loss * square.sum() / total
            penalized.backward()
            loss += nll.detach()
        return loss

    def _guard(self, finite: bool, batches: list[Batch]) -> None:
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row > self.settings.training.skip_limit:
            samples = [int(i) for b in batches for i in b.sample_index]
            raise FloatingPointError(
                f"loss or gradient was not finite in {self._skipped_in_a_row} steps in a row, up "
                f"to step {self.progress.step + 1} with samples {samples[0]} to {samples[-1]}: "
                "lower training.learning_rate, or look at these samples"
            )


def _line(step: Step) -> dict[str, Any]:
    progress = step.progress
    return {
        "step": progress.step,
        "loss": step.loss,
        "learning_rate": step.rate,
        "gradient_norm": step.gradient_norm,
        "tokens_per_second": step.tokens / step.seconds,
        "flops": progress.flops,
        "palm_flops": progress.palm_flops,
        "seen_tokens": progress.seen_tokens,
        "target_tokens": progress.target_tokens,
        "seconds": progress.seconds,
        "skipped": progress.skipped,
    }
