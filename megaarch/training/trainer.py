"""The trainer: one run of one model, from the first step or a checkpoint to its limit.

A step: micro-batches from the loader, loss summed over their targets and divided by the target
weight of all of them (never a mean of means, so the result does not depend on how the rows are
split), gradients clipped, one optimizer step, one line of metrics. Every process of a layout runs
the same trainer; the main one alone writes.

On a GPU a step is launched before the host has read the figures of the step before it, so that the
device never waits for the host. What a save or an evaluation needs is read ahead of it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megaarch.config.fingerprint import RESUMABLE, changed, signature
from megaarch.config.schema import Model, Settings, Training
from megaarch.data.batch import Batch
from megaarch.data.loader import Steps, prefetch
from megaarch.data.rows import Rows
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.distributed.mesh import Grid
from megaarch.engine.base import Engine
from megaarch.engine.build import build_engine
from megaarch.errors import UserError
from megaarch.files import fit
from megaarch.kernels import library
from megaarch.model import flops
from megaarch.model.count import parameter_count
from megaarch.model.positions import position_scheme, scheme_fault
from megaarch.parallel import float8
from megaarch.parallel.parallelize import build_model
from megaarch.parallel.precision import compute_dtype
from megaarch.parallel.validate import check
from megaarch.training import checkpoint, fits, optimizer
from megaarch.training.agreement import Agreement
from megaarch.training.faults import Stopped, Watch
from megaarch.training.garbage import collected_by_hand
from megaarch.training.malloc import keep_freed_memory
from megaarch.training.metrics import Metrics
from megaarch.training.nonfinite import Guard
from megaarch.training.progress import Limit, Progress, learning_rate, limit_change
from megaarch.training.readback import Readback
from megaarch.training.saving import Saver
from megaarch.training.step import Launched, Step
from megaarch.training.totals import Sum

__all__ = ["Trainer", "build_model", "device_of"]

log = logging.getLogger(__name__)

AHEAD = {"cuda": 1}  # steps, by device, launched ahead of the newest whose figures have been read


def device_of(settings: Settings) -> torch.device:
    """The device that `training.device` names; auto is CUDA where there is one."""
    wanted = settings.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device: cuda is asked for and torch finds none; use cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


class Trainer:
    """A run. `prepared` is the data (ingest/prepare.py); `fingerprint` guards a resumed run.

    grid: the processes of the layout; None: this one alone. `model` is what this one holds. heart:
    theirs, which the caller has started.
    watch: called after every step, on every process; on a GPU once the next one is launched.
    hold_out: called with (engine, progress) at `shares` of the limit, on every process, not
    counted as training time.
    """

    def __init__(
        self,
        settings: Settings,
        prepared,
        *,
        grid: Grid | None = None,
        heart: Heartbeat | None = None,
        watch: Callable[[Step], None] = lambda step: None,
        hold_out: Callable[[Engine, Progress], None] | None = None,
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
        float8.check(training, self.grid.device)
        self.heart = heart or Heartbeat(self.grid, training)
        self.device = self.grid.device
        if self.device.type == "cpu":
            keep_freed_memory()
        if settings.model.fused_kernels and (reason := library.obstacle(self.device.type)):
            raise UserError(f"model.fused_kernels: {reason}")
        self.directory = Path(settings.logging.directory)
        self.rows = Rows(settings.model, settings.data, prepared, training.seed)
        if self.grid.is_main and self.rows.truncation:
            log.warning(self.rows.truncation)
        self.fingerprint = prepared.fingerprint
        self.tokenizer = {
            "path": prepared.tokenizer.path,
            "fingerprint": prepared.tokenizer.fingerprint,
        }
        self.engine = build_engine(settings, self.grid)
        self.model = self.engine.model
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
            half=compute_dtype(settings) is not None,
            bias=settings.model.position_encoding == "relative",
            shard=self.engine.shard,
        )
        self.parameters = parameter_count(settings.model, self.model.position_axes)
        self.optimizer = self.engine.adopt(optimizer.build(self.model, training))
        self.progress = self.launched = Progress()  # up to the step read, and launched, last
        self._flying: deque[Launched] = deque()
        self._read_at = 0.0  # when the figures of a step came in last
        self.ahead = AHEAD.get(self.device.type, 0)
        self.guard = Guard(self.directory, training, writes=self.grid.is_main)
        self._saved = -1
        self.saver = Saver(self.directory, training, self.grid)
        self._start()

    def _start(self) -> None:
        """Continue the newest checkpoint of this directory, or start from another's weights."""
        training = self.settings.training
        path = checkpoint.newest(self.directory, self.grid)
        if path is not None and not training.resume:
            raise UserError(
                f"training.resume: {self.directory} holds a run, up to {path.name}: remove it, or "
                "give another logging.directory"
            )
        if path is not None:
            saved = checkpoint.read_progress(path)
            if saved.get(checkpoint.WEIGHTS_ONLY):
                raise UserError(
                    f"{path} holds weights alone and cannot be continued: give another "
                    f"logging.directory, and start from it with training.start_from={path}"
                )
            if saved["fingerprint"] != self.fingerprint:
                raise UserError(
                    f"{path} was trained on other data: its fingerprint is {saved['fingerprint']} "
                    f"and this data's is {self.fingerprint}; restore the data or use another "
                    "logging.directory"
                )
            differences = changed(
                signature(saved["settings"], RESUMABLE), signature(self.settings, RESUMABLE)
            )
            if differences:
                raise UserError(
                    f"{path} was trained with other settings: {'; '.join(differences)}; restore "
                    "them, use another logging.directory, or start a new run from these weights "
                    "with training.start_from"
                )
            checkpoint.load(path, self.engine, self.optimizer, self.grid)
            self.progress = self.launched = Progress.of(saved["progress"])
            self._saved = self.progress.step
            limit = {name: saved["settings"]["training"].get(name) for name in ("steps", "budget")}
            before = fit(training.model_dump() | limit, Training, path / checkpoint.PROGRESS)
            change = limit_change(before, training, self.progress)
            if change and self.grid.is_main:
                log.warning("%s: %s", path, change)
        elif training.start_from:
            found = self._parent(Path(training.start_from))
            self._check_parent(found)
            checkpoint.load(found, self.engine, None, self.grid)

    def _parent(self, given: Path) -> Path:
        """The checkpoint to start from: `given` itself, or the newest of that run."""
        if not (given / "manifest.json").exists():
            found = checkpoint.newest(given, self.grid)
            if found is None:
                raise UserError(f"training.start_from: no complete checkpoint in {given}")
            return found
        if fault := checkpoint.find_fault(given, self.grid):
            raise UserError(
                f"training.start_from: checkpoint {given} is damaged ({fault}): give the run's "
                "directory, and the newest sound one is taken"
            )
        return given

    def _check_parent(self, found: Path) -> None:
        """ValueError where tokens or positions mean something else to these weights."""
        saved, mine = checkpoint.read_progress(found), self.settings
        tokenizer = saved["tokenizer"]
        if tokenizer["fingerprint"] != self.tokenizer["fingerprint"]:
            raise UserError(
                f"training.start_from: {found} was trained with another tokenizer: set "
                f"data.tokenizer={tokenizer['path']}"
            )
        model, objective = saved["settings"]["model"], saved["settings"]["data"]["objective"]
        fault = scheme_fault(
            position_scheme(fit(model, Model, found / checkpoint.PROGRESS), objective),
            position_scheme(mine.model, mine.data.objective),
        )
        if fault:
            raise UserError(
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
                asked = Agreement(self.grid).reach(signals.asked, 0)[0] if more else 0
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
        every, workers = self.settings.training.save_every, self.settings.data.workers
        agreement = Agreement(self.grid, self.ahead)
        with (
            prefetch(self.steps, self.progress.step, workers) as batches,
            collected_by_hand() as collect,
        ):
            added_up = self.added_up(batches)
            while not self.limit.reached(self.launched):
                before = self.limit.share(self.launched)
                started = time.perf_counter()
                with self.heart.step(self.launched.step + 1):
                    self.launch(*next(added_up), started)
                    step, done = self.launched.step, self.limit.reached(self.launched)
                    saves = every and step % every == 0
                    stays = done or saves or self._evaluates(before, done)
                    self._read(metrics, 0 if stays else self.ahead)
                collect(step)
                self._evaluate(before, done)
                if done:
                    break
                asked, ready = agreement.reach(signals.asked, self.saver.ready)
                self.saver.settle(ready)
                if asked or saves:
                    self._read(metrics)
                    self.save(wait=bool(asked))
                if asked:
                    raise Stopped(asked, self.progress.step)

    def added_up(self, batches: Iterator[list[Batch]]) -> Iterator[tuple[list[Batch], Sum]]:
        """Micro-batches with their totals, whose sum the device begins as many steps ahead as the
        host runs ahead of it."""
        made: deque[tuple[list[Batch], Sum]] = deque()
        for micro_batches in batches:
            made.append((micro_batches, Sum(micro_batches, self.grid)))
            if len(made) > self.ahead:
                yield made.popleft()

    def _read(self, metrics: Metrics | None, ahead: int = 0) -> None:
        """Reads launched steps but the newest `ahead`, and passes them on."""
        for step in self.finished(ahead):
            if metrics:
                metrics.write(step.line())
            self.watch(step)

    def _evaluates(self, before: float, done: bool) -> bool:
        share = 1.0 if done else self.limit.share(self.launched)
        return bool(self.hold_out) and any(before < point <= share for point in self.shares)

    def _evaluate(self, before: float, done: bool = False) -> None:
        if self._evaluates(before, done):
            self.engine.eval()
            with torch.no_grad():
                self.hold_out(self.engine, self.progress)

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
            self.saver.save(self.progress.step, self.engine, self.optimizer, record)
            self._saved = self.progress.step
        if wait:
            self.saver.finish()

    def train_step(self, batches: list[Batch], started: float | None = None) -> Step:
        """One optimizer step on these micro-batches, waited for. started: as `launch` says."""
        self.launch(batches, Sum(batches, self.grid), started)
        return self.read()

    def launch(self, batches: list[Batch], total: Sum, started: float | None = None) -> None:
        """Begins an optimizer step on these micro-batches, whose totals are `total`. Waits for nothing
        that the device was given before, but with an optimizer that `step_if` waits for. started:
        `time.perf_counter` of when the micro-batches' making began, None: now."""
        training, model = self.settings.training, self.settings.model
        started = time.perf_counter() if started is None else started
        totals = total.read()
        after = self.launched.after(
            totals.counts,
            flops=flops.training(model, totals.counts),
            palm_flops=flops.palm(model, totals.counts, self.parameters),
            seconds=0.0,
            skipped=False,
        )
        rate = learning_rate(training, after.step, self.limit.share(after))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.forward_backward(batches, totals.weight)
        norm, finite = self.engine.update(self.optimizer, loss)
        figures = Readback(torch.stack([x.double() for x in (loss, norm, finite)]))
        self.launched = after
        self._flying.append(Launched(after, totals, rate, started, figures))

    def read(self) -> Step:
        """Waits for the earliest step that is launched and not read. FloatingPointError as
        `Guard.see`. Its seconds end now, and begin no sooner than those of the step before it end."""
        launched = self._flying.popleft()
        loss, norm, finite = launched.figures.read()
        self.guard.see(launched.progress.step, loss, norm, bool(finite))
        now = time.perf_counter()
        seconds = now - max(launched.started, self._read_at)
        self._read_at = now
        self.progress = replace(
            launched.progress,
            seconds=self.progress.seconds + seconds,
            skipped=self.progress.skipped + (not finite),
        )
        return Step(
            self.progress,
            self.limit.share(self.progress),
            loss,
            norm,
            launched.rate,
            seconds,
            sum(launched.totals.counts.tokens),
        )

    def finished(self, ahead: int = 0) -> Iterator[Step]:
        """Reads launched steps, in order, until the newest `ahead` are left."""
        while len(self._flying) > ahead:
            yield self.read()

    def forward_backward(self, batches: list[Batch], weight: float | None = None) -> torch.Tensor:
        """Gradients of the mean loss over all targets of `batches`; returns that loss (nats a
        target, z-loss left out). weight: of the targets on all data ranks; None: it is added up."""
        if weight is None:
            weight = Sum(batches, self.grid).read().weight
        self.engine.train()
        self.model.set_dropout_step(self.settings.training.seed, self.launched.step)
        return self.engine.forward_backward(batches, max(weight, 1e-8))
