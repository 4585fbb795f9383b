"""The trainer: one run of one model, from the first step or a checkpoint to its limit.

A step: micro-batches from the loader, loss summed over their targets and divided by the target
weight of all of them (never a mean of means, so the result does not depend on how the rows are
split), gradients clipped, one optimizer step, one line of metrics. Every process of a layout runs
the same trainer; the main one alone writes.

On a GPU a step is launched before the host has read the metrics of the step before it, so that the
device never waits for the host. What a save or an evaluation needs is read before it.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megaarch.checkpoint.record import SAMPLES, CheckpointRecord, Progress, SavedTokenizer
from megaarch.checkpoint.saving import Saver
from megaarch.config.schema import Settings
from megaarch.data import tokens_per_batch
from megaarch.data.batch import Batch
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps, prefetch
from megaarch.distributed.heartbeat import Heartbeat
from megaarch.distributed.mesh import Grid
from megaarch.engine.base import Engine
from megaarch.engine.build import build_engine
from megaarch.errors import UserError
from megaarch.kernels import bindings
from megaarch.model import flops
from megaarch.model.parameter_count import parameter_count
from megaarch.parallel import float8
from megaarch.parallel.precision import compute_dtype
from megaarch.parallel.validate import check
from megaarch.training import memory_check, optimizer, utilization
from megaarch.training.host_memory import collected_by_hand, keep_freed_memory
from megaarch.training.limit import Limit
from megaarch.training.lr_schedule import learning_rate, unfinished_warmup
from megaarch.training.metrics import Metrics
from megaarch.training.nonfinite import Guard
from megaarch.training.preemption import Stopped, Watch
from megaarch.training.profile import traced
from megaarch.training.rank_agreement import Agreement
from megaarch.training.resume import find_start, resume
from megaarch.training.steps_in_flight import Launched, PendingTotals, Readback, Step

log = logging.getLogger(__name__)

AHEAD = {"cuda": 1}  # steps, by device, launched before the newest whose numbers have been read


def device_of(settings: Settings) -> torch.device:
    """Returns the device that `training.device` names."""
    return device_named(settings.training.device, "training.device")


def device_named(wanted: str, setting: str) -> torch.device:
    """Returns the device that a setting names: cpu, cuda or auto, which is CUDA where there is one. UserError where
    there should be one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{setting}: cuda is asked for and torch finds none; use cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
        if wanted == "cpu" and gpus not in ("", "0"):
            raise UserError(
                f"SLURM gave this job {gpus} GPUs on {socket.gethostname()}, and torch finds none: leave "
                f"the machine out, mend the environment, or set {setting} to cpu"
            )
    return torch.device(wanted)


class Trainer:
    """A run. `prepared` is the data (ingest/prepare.py); `fingerprint` guards a resumed run.

    grid: the processes of the layout; None: this one alone. `model` is what this one holds.
    heartbeat: theirs, which the caller has started.
    watch: called after every step, on every process; on a GPU once the next one is launched.
    hold_out: takes (engine, progress) and returns the model's bits per byte of held-out text, None for no
    value. Called at `shares` of what the limit leaves to this run and every `training.eval_every`
    steps, on every process, not counted as training time.
    """

    def __init__(
        self,
        settings: Settings,
        prepared,
        *,
        grid: Grid | None = None,
        heartbeat: Heartbeat | None = None,
        watch: Callable[[Step], None] = lambda step: None,
        hold_out: Callable[[Engine, Progress], float | None] | None = None,
        shares: tuple[float, ...] = (),
    ):
        self.given, self.settings, self.watch = settings, settings, watch
        self.hold_out = hold_out
        training = settings.training
        self.limit = Limit.of(training)
        self.grid = grid or Grid.single(device_of(settings))
        self.device = self.grid.device
        self._set_up_process()
        self.heartbeat = heartbeat or Heartbeat(self.grid, training)
        self.directory = Path(settings.logging.directory)
        start = find_start(settings, self.grid)
        self.generation = start.generation
        data_seed = start.data_seed(training.seed)
        self.rows = Rows(settings.model, settings.data, prepared, data_seed)
        self.rows_a_step, error = tokens_per_batch.rows_a_step(training, self.rows)
        self.settings = settings = tokens_per_batch.in_rows(settings, self.rows_a_step)
        notes = self.rows.truncation, tokens_per_batch.uncertain(error), unfinished_warmup(training)
        for sentence in filter(None, notes if self.grid.is_main else ()):
            log.warning(sentence)
        self.fingerprint = prepared.fingerprint
        used = prepared.tokenizer
        self.tokenizer = SavedTokenizer(path=used.path, fingerprint=used.fingerprint)
        self.engine = build_engine(settings, self.grid)
        self.model = self.engine.model
        self.steps = self._loader()
        self.parameters = parameter_count(settings.model, self.model.position_axes)
        self.optimizer = self.engine.adopt(optimizer.build(self.model, training))
        self.in_flight: deque[Launched] = deque()
        self._read_at = 0.0  # when the numbers of a step came in last
        self.ahead = AHEAD.get(self.device.type, 0)
        self.guard = Guard(self.directory, training, self.steps.samples, writes=self.grid.is_main)
        self.saver = Saver(self.directory, training, self.grid)
        self.metrics: Metrics | None = None
        # totals up to the step that was read last, and that was launched last
        self.progress, self.inherited = resume(
            start, self.given, self.fingerprint, used.fingerprint, self.engine, self.optimizer
        )
        self.launched = self.progress
        self._saved = -1 if self.is_new else self.progress.step
        begin = self.limit.share(self.inherited)
        self.shares = tuple(begin + (1 - begin) * share for share in shares)
        # whether held-out text is to be scored at this step: behind the step's save, if there is one
        self.unscored = self._evaluates(-1.0) if self.is_new else start.is_unscored

    @property
    def is_new(self) -> bool:
        """Whether this run has taken no step yet, whatever it has inherited."""
        return self.progress.step == self.inherited.step

    def _set_up_process(self) -> None:
        """Sets what holds for the whole process. UserError where it cannot run these settings."""
        settings, training = self.settings, self.settings.training
        if training.threads:
            torch.set_num_threads(training.threads)
        torch.use_deterministic_algorithms(training.deterministic)
        check(settings, self.grid.world_size)
        memory_check.check(settings, self.device)
        float8.check(training, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        if settings.model.fused_kernels and (reason := bindings.obstacle(self.device.type)):
            raise UserError(f"model.fused_kernels: {reason}")

    def _loader(self) -> Steps:
        model, training = self.settings.model, self.settings.training
        return Steps(
            self.rows,
            global_batch_size=training.global_batch_size,
            rows_a_step=self.rows_a_step,
            micro_batch_size=training.micro_batch_size,
            rank=self.grid.data_rank,
            ranks=self.grid.data_ranks,
            multiple=self.grid.row_multiple,
            device_type=self.device.type,
            kernel=model.attention,
            fused_rows="rows" in model.fused_kernels,
            half=compute_dtype(self.settings) is not None,
            bias=model.position_encoding == "relative",
            shard=self.engine.shard,
        )

    def run(self, more: bool = False) -> Progress:
        """Trains to the limit; returns the totals. Stopped by a signal, it finishes the step, saves
        and raises Stopped. A run that has come to its limit is complete, and ends well.

        more: the caller goes on from there (scoring), so that a signal which came by the end of the
        last save raises Stopped too.
        """
        with self._session() as signals:
            self._evaluate()
            self._train(signals)
            self.save()
            self._evaluate()
            asked = Agreement(self.grid).reach(signals.asked, 0)[0] if more else 0
        if asked:
            raise Stopped(asked, self.progress.step)
        return self.progress

    @contextmanager
    def _session(self) -> Iterator[Watch]:
        """Writes metrics and listens for signals inside the block."""
        with self.grid.on_main() as main:  # a mistake in where they go is one of all processes
            if main:
                given = self.given.model_dump(mode="json")
                step = self.progress.step
                last_scored = -1 if self.is_new else step - self.unscored
                scored = last_scored if self.hold_out else None
                self.metrics = Metrics(self.settings.logging, step, given, scored)
        try:
            with Watch() as signals:
                try:
                    yield signals
                except Exception as error:  # what is being written is older, and sound
                    # a FloatingPointError is raised by all ranks at once; others by one that others wait for
                    if self.grid.mesh is None or isinstance(error, FloatingPointError):
                        self.saver.finish()
                    raise
        finally:
            if self.metrics:
                self.metrics.close()
                self.metrics = None

    def _train(self, signals: Watch) -> None:
        every, workers = self.settings.training.save_every, self.settings.data.workers
        agreement = Agreement(self.grid, self.ahead)
        with (
            prefetch(self.steps, self.progress.step, workers) as batches,
            collected_by_hand() as collect,
            traced(self.settings.logging, self.grid, self.progress.step) as end_of_step,
        ):
            with_totals = self.with_totals(batches)
            while not self.limit.reached(self.launched):
                before = self.limit.share(self.launched)
                started = time.perf_counter()
                with self.heartbeat.step(self.launched.step + 1):
                    self.train_step(*next(with_totals), started)
                    step, done = self.launched.step, self.limit.reached(self.launched)
                    saves = every and step % every == 0
                    self.unscored = self._evaluates(before, done)
                    # a save and an evaluation need the numbers of all steps before them
                    waits = done or saves or self.unscored
                    self._report(0 if waits else self.ahead)
                collect(step)
                if done:
                    break
                asked, ready = agreement.reach(signals.asked, self.saver.ready)
                self.saver.finish_if(ready)
                if asked or saves:
                    self._report()
                    self.save(wait=bool(asked))
                if asked:
                    raise Stopped(asked, self.progress.step)
                self._evaluate()
                end_of_step()

    def with_totals(
        self, batches: Iterator[list[Batch]]
    ) -> Iterator[tuple[list[Batch], PendingTotals]]:
        """Yields micro-batches with their totals, whose sum the device begins as many steps before
        as the host runs ahead of it."""
        made: deque[tuple[list[Batch], PendingTotals]] = deque()
        for micro_batches in batches:
            made.append((micro_batches, PendingTotals(micro_batches, self.grid)))
            if len(made) > self.ahead:
                yield made.popleft()

    def train_step(
        self, micro_batches: list[Batch], pending: PendingTotals, started: float | None = None
    ) -> None:
        """Launches an optimizer step on these micro-batches, whose totals are `pending`. Waits for
        nothing that the device was given before, but with an optimizer that `step_if` waits for.

        started: `time.perf_counter` of when the micro-batches' making began, None: now.
        """
        training, model = self.settings.training, self.settings.model
        started = time.perf_counter() if started is None else started
        counts, weight = pending.read()
        after = self.launched.plus(
            step=1,
            flops=flops.training(model, counts),
            palm_flops=flops.palm(model, counts, self.parameters),
            seen_tokens=sum(counts.tokens),
            target_tokens=counts.targets,
            slots=sum(counts.slots),
        )
        rate = learning_rate(training, after.step, self.limit.share(after))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.train()
        self.model.set_dropout_step(training.seed, self.launched.step)
        loss = self.engine.forward_backward(micro_batches, max(weight, 1e-8))
        norm, taken = self.engine.update(self.optimizer, loss)
        numbers = Readback(torch.stack([x.double() for x in (loss, norm, taken)]))
        self.launched = after
        self.in_flight.append(Launched(after, rate, started, numbers))

    def step(self, micro_batches: list[Batch]) -> Step:
        """Takes one optimizer step on these micro-batches, and waits for its numbers."""
        self.train_step(micro_batches, PendingTotals(micro_batches, self.grid))
        return self.read()

    def read(self) -> Step:
        """Waits for the earliest step in flight. FloatingPointError as `Guard.see`. Its seconds end
        now, and begin no sooner than those of the step before it end."""
        launched = self.in_flight.popleft()
        loss, norm, taken = launched.numbers.read()
        self.guard.see(launched.progress.step, loss, norm, bool(taken))
        now = time.perf_counter()
        seconds = now - max(launched.started, self._read_at)
        self._read_at = now
        before = self.progress
        self.progress = launched.progress.model_copy(
            update={"seconds": before.seconds + seconds, "skipped": before.skipped + (not taken)}
        )
        own = self.progress.since(before)
        return Step(
            self.progress,
            self.limit.share(self.progress),
            loss,
            norm,
            launched.rate,
            seconds,
            own.seen_tokens,
            utilization.of_step(own.flops, seconds, self.device, self.grid.world_size),
        )

    def read_steps(self, ahead: int = 0) -> Iterator[Step]:
        """Reads steps in flight, in order, until the newest `ahead` are left."""
        while len(self.in_flight) > ahead:
            yield self.read()

    def _report(self, ahead: int = 0) -> None:
        """Reads steps in flight but the newest `ahead`, and passes them on."""
        for step in self.read_steps(ahead):
            if self.metrics:
                self.metrics.write(step.line())
            self.watch(step)

    def _evaluates(self, before: float, done: bool = False) -> bool:
        """Whether held-out text is to be scored now. before: share of the limit before the last step."""
        if self.hold_out is None:
            return False
        every = self.settings.training.eval_every
        share = 1.0 if done else self.limit.share(self.launched)
        is_due = every > 0 and self.launched.step % every == 0
        return is_due or any(before < point <= share for point in self.shares)

    def _evaluate(self) -> None:
        if self.hold_out and self.unscored:
            self.engine.eval()
            with torch.no_grad():
                value = self.hold_out(self.engine, self.progress)
            if self.metrics:
                own = self.progress.since(self.inherited)
                self.metrics.write_heldout(self.progress.step, own.flops, own.seconds, value)
            self.unscored = False

    def save(self, wait: bool = True) -> None:
        """Saves a checkpoint of this moment, unless there is one. wait: until it is complete, even
        where it is written in the background."""
        if self._saved != self.progress.step:
            record = {
                "progress": self.progress,
                "fingerprint": self.fingerprint,
                "settings": self.given.model_dump(mode="json", by_alias=True),
                "tokenizer": self.tokenizer,
                "samples": SAMPLES,
                "generation": self.generation,
            }
            if self.inherited.step:
                record["inherited"] = self.inherited
            if self.unscored:
                record["unscored"] = True
            self.saver.save(self.engine, self.optimizer, CheckpointRecord.model_validate(record))
            self._saved = self.progress.step
        if wait:
            self.saver.finish()
