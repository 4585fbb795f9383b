"""The trainer: one run of one model, from the first step or a checkpoint to its limit.

A step: micro-batches from the loader, loss summed over their targets and divided by the target
weight of all of them (never a mean of means, so the result does not depend on how the rows are
split), gradients clipped, one optimizer step, one line of metrics. Every process of a layout runs
the same trainer; the main one alone writes.
"""

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaarch import flops
from megaarch.data.batch import Batch, Counts
from megaarch.data.loader import Steps, prefetch
from megaarch.data.rows import Rows
from megaarch.kernels import library
from megaarch.model.count import parameter_count
from megaarch.model.positions import position_scheme, scheme_fault
from megaarch.parallel.build import build_model
from megaarch.parallel.heartbeat import Heartbeat
from megaarch.parallel.mesh import AXES, DATA, Grid, check
from megaarch.parallel.replica import Replica, replica_of
from megaarch.reading import fit
from megaarch.settings import Model, Settings, Training
from megaarch.signature import RESUMABLE, changed, signature
from megaarch.training import checkpoint, fits, optimizer
from megaarch.training.faults import Stopped, Watch
from megaarch.training.garbage import collected_by_hand
from megaarch.training.heap import keep_freed_memory
from megaarch.training.metrics import Metrics
from megaarch.training.nonfinite import Guard
from megaarch.training.progress import Limit, Progress, learning_rate, limit_change
from megaarch.training.saving import Saver

__all__ = ["Step", "Trainer", "build_model", "device_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one step did. loss: nats a target. seconds: of this step, with the wait for its batches.
    rate: learning rate."""

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


class Trainer:
    """A run. `prepared` is the data (data/prepare.py); `fingerprint` guards a resumed run.

    grid: the processes of the layout; None: this one alone. `model` is what this one holds. heart:
    theirs, which the caller has started.
    watch: called after every step, on every process. hold_out: called with (replica, progress) at
    `shares` of the limit, on every process, not counted as training time.
    """

    def __init__(
        self,
        settings: Settings,
        prepared,
        *,
        grid: Grid | None = None,
        heart: Heartbeat | None = None,
        watch: Callable[[Step], None] = lambda step: None,
        hold_out: Callable[[Replica, Progress], None] | None = None,
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
        self.grid = grid or Grid.single(device_of(settings))
        check(settings, self.grid.world_size)
        fits.check(settings, self.grid.device)
        self.heart = heart or Heartbeat(self.grid, training)
        self.device = self.grid.device
        if self.device.type == "cpu":
            keep_freed_memory()
        if settings.model.fused_kernels and (reason := library.obstacle(self.device.type)):
            raise ValueError(f"model.fused_kernels: {reason}")
        self.directory = Path(settings.logging.directory)
        self.rows = Rows(settings.model, settings.data, prepared, training.seed)
        if self.grid.is_main and self.rows.truncation:
            log.warning(self.rows.truncation)
        self.steps = Steps(
            self.rows,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            rank=self.grid.data_rank,
            ranks=self.grid.data_ranks,
            multiple=self.grid.row_multiple,
            device_type=self.device.type,
            kernel=settings.model.attention,
            fused_rows="rows" in settings.model.fused_kernels,
        )
        self.fingerprint = prepared.fingerprint
        self.tokenizer = {
            "path": prepared.tokenizer.path,
            "fingerprint": prepared.tokenizer.fingerprint,
        }
        self.replica = replica_of(settings, self.grid)
        self.model = self.replica.model
        self.parameters = parameter_count(settings.model, self.model.position_axes)
        self.optimizer = self.replica.adopt(optimizer.build(self.model, training))
        self.progress = Progress()
        self.guard = Guard(self.directory, training, writes=self.grid.is_main)
        self._saved = -1
        self.saver = Saver(self.directory, training, self.grid)
        self._start()

    def _start(self) -> None:
        """Continue the newest checkpoint of this directory, or start from another's weights."""
        training = self.settings.training
        path = checkpoint.newest(self.directory, self.grid)
        if path is not None and not training.resume:
            raise ValueError(
                f"training.resume: {self.directory} holds a run, up to {path.name}: remove it, or "
                "give another logging.directory"
            )
        if path is not None:
            saved = checkpoint.read_progress(path)
            if saved.get(checkpoint.WEIGHTS_ONLY):
                raise ValueError(
                    f"{path} holds weights alone and cannot be continued: give another "
                    f"logging.directory, and start from it with training.start_from={path}"
                )
            if saved["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{path} was trained on other data: its fingerprint is {saved['fingerprint']} "
                    f"and this data's is {self.fingerprint}; restore the data or use another "
                    "logging.directory"
                )
            differences = changed(
                signature(saved["settings"], RESUMABLE), signature(self.settings, RESUMABLE)
            )
            if differences:
                raise ValueError(
                    f"{path} was trained with other settings: {'; '.join(differences)}; restore "
                    "them, use another logging.directory, or start a new run from these weights "
                    "with training.start_from"
                )
            checkpoint.load(path, self.replica, self.optimizer, self.grid)
            self.progress = Progress.of(saved["progress"])
            self._saved = self.progress.step
            limit = {name: saved["settings"]["training"].get(name) for name in ("steps", "budget")}
            before = fit(training.model_dump() | limit, Training, path / checkpoint.PROGRESS)
            change = limit_change(before, training, self.progress)
            if change and self.grid.is_main:
                log.warning("%s: %s", path, change)
        elif training.start_from:
            found = self._parent(Path(training.start_from))
            self._check_parent(found)
            checkpoint.load(found, self.replica, None, self.grid)

    def _parent(self, given: Path) -> Path:
        """The checkpoint to start from: `given` itself, or the newest of that run."""
        if not (given / "manifest.json").exists():
            found = checkpoint.newest(given, self.grid)
            if found is None:
                raise ValueError(f"training.start_from: no complete checkpoint in {given}")
            return found
        if fault := checkpoint.find_fault(given, self.grid):
            raise ValueError(
                f"training.start_from: checkpoint {given} is damaged ({fault}): give the run's "
                "directory, and the newest sound one is taken"
            )
        return given

    def _check_parent(self, found: Path) -> None:
        """ValueError where tokens or positions mean something else to these weights."""
        saved, mine = checkpoint.read_progress(found), self.settings
        tokenizer = saved["tokenizer"]
        if tokenizer["fingerprint"] != self.tokenizer["fingerprint"]:
            raise ValueError(
                f"training.start_from: {found} was trained with another tokenizer: set "
                f"data.tokenizer={tokenizer['path']}"
            )
        model, objective = saved["settings"]["model"], saved["settings"]["data"]["objective"]
        fault = scheme_fault(
            position_scheme(fit(model, Model, found / checkpoint.PROGRESS), objective),
            position_scheme(mine.model, mine.data.objective),
        )
        if fault:
            raise ValueError(
                f"training.start_from: positions mean something else to the weights of {found}: {fault}"
            )

    def run(self, more: bool = False) -> Progress:
        """Train to the limit; returns the totals. Told to stop by a signal, it finishes the step,
        saves and raises Stopped. A run that has come to its limit is complete, and ends well.

        more: the caller goes on from there (scoring), so that a signal which came by the end of the
        last save raises Stopped too.
        """
        settings = self.settings
        metrics = None
        if self.grid.is_main:
            given = settings.model_dump(mode="json")
            metrics = Metrics(settings.logging, self.progress.step, given)
        try:
            with Watch() as signals:
                self._run(metrics, signals)
                asked = self._asked(signals) if more else 0
        finally:
            if metrics:
                metrics.close()
        if asked:
            raise Stopped(asked, self.progress.step)
        return self.progress

    def _run(self, metrics: Metrics | None, signals: Watch) -> None:
        try:
            if self.progress.step == 0:
                self._evaluate(-1.0)
            self._train(metrics, signals)
            self.save()
        except FloatingPointError:  # of all ranks at once; what is being written is from before
            self.saver.finish()
            raise

    def _train(self, metrics: Metrics | None, signals: Watch) -> None:
        every = self.settings.training.save_every
        workers = self.settings.data.workers
        with (
            prefetch(self.steps, self.progress.step, workers) as batches,
            collected_by_hand() as collect,
        ):
            while not self.limit.reached(self.progress):
                before = self.limit.share(self.progress)
                started = time.perf_counter()
                with self.heart.step(self.progress.step + 1):
                    step = self.train_step(next(batches), started)
                if metrics:
                    metrics.write(_line(step))
                self.watch(step)
                collect(self.progress.step)
                done = self.limit.reached(self.progress)
                self._evaluate(before, done)
                if done:
                    break
                self.saver.settle()
                asked = self._asked(signals)
                if asked or (every and self.progress.step % every == 0):
                    self.save(wait=bool(asked))
                if asked:
                    raise Stopped(asked, self.progress.step)

    def _asked(self, signals: Watch) -> int:
        """The signal that any rank has heard, or 0: all stop at the same step."""
        if self.grid.mesh is None:
            return signals.asked
        heard = torch.zeros(signal.NSIG, device=self.device)
        heard[signals.asked] = 1.0
        heard[0] = 0.0
        heard = self.grid.sum(heard, tuple(AXES))
        return int(heard.argmax()) if bool(heard.any()) else 0

    def _evaluate(self, before: float, done: bool = False) -> None:
        share = 1.0 if done else self.limit.share(self.progress)
        if self.hold_out and any(before < point <= share for point in self.shares):
            self.replica.eval()
            with torch.no_grad():
                self.hold_out(self.replica, self.progress)

    def save(self, wait: bool = True) -> None:
        """A checkpoint of this moment, unless there is one. wait: until it is complete, even where
        it is written in the background."""
        if self._saved != self.progress.step:
            record = {
                "progress": asdict(self.progress),
                "fingerprint": self.fingerprint,
                "settings": self.settings.model_dump(mode="json", by_alias=True),
                "tokenizer": self.tokenizer,
            }
            self.saver.save(self.progress.step, self.replica, self.optimizer, record)
            self._saved = self.progress.step
        if wait:
            self.saver.finish()

    def train_step(self, batches: list[Batch], started: float | None = None) -> Step:
        """One optimizer step on these micro-batches. started: `time.perf_counter` of when their
        making began, None: now."""
        training, model = self.settings.training, self.settings.model
        started = time.perf_counter() if started is None else started
        counts = self._everywhere(sum((b.counts for b in batches[1:]), batches[0].counts))
        cost = flops.training(model, counts)
        palm = flops.palm(model, counts, self.parameters)
        after = self.progress.after(counts, flops=cost, palm_flops=palm, seconds=0.0, skipped=False)
        rate = learning_rate(training, after.step, self.limit.share(after))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.forward_backward(batches)
        norm, finite = self.replica.update(self.optimizer, loss)
        self.guard.see(after.step, float(loss), float(norm), finite)
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
        weight = self._sum([float(sum(b.target_weights.sum() for b in batches))])[0]
        self.replica.train()
        self.model.set_dropout_step(self.settings.training.seed, self.progress.step)
        return self.replica.forward_backward(batches, max(weight, 1e-8))

    def _everywhere(self, counts: Counts) -> Counts:
        """The counts of all data ranks' micro-batches."""
        flat = [counts.rows, counts.targets]
        tuples = (counts.tokens, counts.areas, counts.cross_areas, counts.slots)
        for values in tuples:
            flat += values
        rows, targets, *rest = (int(x) for x in self._sum(flat))
        streams = len(counts.tokens)
        tokens, areas, cross, slots = (
            tuple(rest[i * streams : (i + 1) * streams]) for i in range(len(tuples))
        )
        return Counts(rows, tokens, areas, cross, targets, slots)

    def _sum(self, values: list[float]) -> list[float]:
        """Each figure summed over the data ranks; whole numbers exactly, up to 2**53."""
        if self.grid.data_ranks == 1:
            return values
        figures = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.grid.sum(figures, DATA).tolist()


def _line(step: Step) -> dict[str, Any]:
    progress = step.progress
    return {
        "step": progress.step,
        "share": step.share,
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
