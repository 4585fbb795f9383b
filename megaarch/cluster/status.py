"""How far a study or a run is: each cell's state, progress, throughput and time left.

All of it is read from the folder; squeue (and sacct, where the cluster keeps accounts) says
which jobs wait or run. Without SLURM the cells' locks say what runs on this machine.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from megaarch.checkpoint import checkpoint
from megaarch.cluster import slurm_commands, submit
from megaarch.distributed.heartbeat import LOST
from megaarch.errors import UserError
from megaarch.files import Schema, open_regular
from megaarch.study import lock
from megaarch.study.cells import StudyCell, expand
from megaarch.study.folder import load_config
from megaarch.study.progress_bar import clock
from megaarch.study.results import CellRecord
from megaarch.training.limit import Limit
from megaarch.training.metrics import parse_line
from megaarch.training.preemption import REQUEUE

TAIL = 1 << 16  # bytes of metrics.jsonl that are read
GOING = ("running", "waiting")
ENDED = ("failed", "diverged", "not run")  # states with a reason worth a line of its own
RECENT = 20  # steps over which speed is averaged
# sacct's states of a task that has not ended
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ALIVE = (
    *("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT"),
    *("SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"),
)


Amount = Annotated[float, Field(ge=0)]


class _Line(Schema):
    """What is read of a step's line in metrics.jsonl."""

    step: Annotated[int, Field(ge=1)]
    seconds: Amount
    seen_tokens: Amount
    tokens_per_second: Amount
    loss: float | None  # of a skipped step
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    flops: Amount | None = None
    target_tokens: Amount | None = None
    mfu: Amount | None = None
    peak_memory: Amount | None = None


@dataclass(frozen=True)
class State:
    """A cell, another job of the study, or a run. task: "12_3", SLURM's; None where none is known.

    state: done, diverged, running, waiting, failed, stopped (it has begun, and no job of it is left), not
    run (its job ended before it began, e.g. because an earlier one failed), not started.
    mfu, peak_memory: as metrics.jsonl has them, of a run on GPUs.
    """

    name: str
    state: str
    why: str = ""
    task: str | None = None
    step: int | None = None
    share: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    mfu: float | None = None
    peak_memory: float | None = None


def status(directory: Path) -> list[State]:
    """The study's cells, then its other jobs; of a run's folder, the run. UserError where the
    folder is neither."""
    if not (directory / "study.yaml").exists():
        return [_run(directory)]
    grid = expand(load_config(directory), directory)
    jobs = submit.read(directory)
    ids = [job.id for job in jobs]
    queued, ended = slurm_commands.queue(ids), slurm_commands.accounts(ids)
    known: dict[str, tuple[str, str, str | None]] = {}
    for job in jobs:
        for place, name in (job.tasks or {0: job.name}).items():
            task = _Task(directory / "jobs", job.name, f"{job.id}_{place}")
            known[name] = (*_known(task, queued, ended), task.id)
    states = [_cell(cell, *known.pop(cell.key, ("", "", None))) for cell in grid]
    for name, (state, why, number) in known.items():
        states.append(State(name, state or "stopped", why, number))
    return states


def _run(folder: Path) -> State:
    """A run that `megaarch train` has made."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "lock")):
        raise UserError(
            f"{folder} is no study's folder, and no run's: give one that megaarch compare, submit "
            "or train has made"
        )
    lines = _last_lines(folder / "metrics.jsonl")
    share, step = (lines[-1].share, lines[-1].step) if lines else (None, 0)
    state = "stopped" if lines else "not started"
    if lock.is_held(folder):
        state = "running"
    # Limit.reached, where the share of the limit is all that is known of it
    elif share and 1 - share < 0.5 * share / step and checkpoint.place(folder, step).exists():
        state = "done"
    return _measured(State(str(folder), state), lines, share)


@dataclass(frozen=True)
class _Task:
    """A task that was submitted. folder: of the study's jobs. id: "12_3", SLURM's."""

    folder: Path
    job: str
    id: str

    @property
    def log(self) -> Path:
        return self.folder / f"{self.job}-{self.id}.log"

    def code(self) -> int | None:
        """The exit code that the job noted; None where it has not ended."""
        try:
            return int((self.folder / f"{self.id}.code").read_text())
        except (OSError, ValueError):
            return None

    def last_words(self) -> str:
        """The sentence with which the job ended."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        told = [line for line in lines if line.startswith("megaarch: ")]
        if told:
            return told[-1].removeprefix("megaarch: ")
        if any("DUE TO TIME LIMIT" in line for line in lines):  # so slurmstepd says
            return "its time limit was too short: submit again with a longer one"
        return f"see {self.log}"


def _known(
    task: _Task, queued: dict[str, tuple[str, str]] | None, ended: dict[str, str]
) -> tuple[str, str]:
    """What SLURM and the job's own note say of a task: its state ("" for nothing known), why."""
    last = ended.get(task.id)
    if queued is None and last in (*QUEUED, *ALIVE):
        queued = {task.id: (last, "")}
    if queued is not None and task.id in queued:
        state, reason = queued[task.id]
        if state in QUEUED:
            return "waiting", "to continue" if task.log.exists() else reason
        return "running", "" if state == "RUNNING" else _in_words(state)
    code = task.code()
    if code == 0 or (code is None and last == "COMPLETED"):
        return "done", ""
    # after these codes a job may go back to the queue (launch/job.sh), where no squeue says whether it has
    may_go_on = code in (None, REQUEUE) or (queued is None and (code == LOST or code > 128))
    if not may_go_on:
        return "failed", task.last_words() or f"exit code {code}"
    if last is not None and last not in (*QUEUED, *ALIVE):
        return "failed", _in_words(last)
    if queued is None:
        return "", "squeue does not answer"
    return ("", "") if task.log.exists() else ("not run", "a job before it failed, or scancel")


def _in_words(state: str) -> str:
    return state.lower().replace("_", " ")


def _cell(cell: StudyCell, state: str, why: str, task: str | None) -> State:
    """state, why: of its task, as `_known` says."""
    folder = Path(cell.settings.logging.directory)
    record = CellRecord.read(folder)
    lines = _last_lines(folder / "metrics.jsonl")
    if record and record.result:
        state, why = "done", ""
    elif record and record.diverged and state not in GOING and not lock.is_held(folder):
        gone = record.diverged
        state, why, task = "not run" if gone.parent else "diverged", gone.said, cell.key
    elif not state or state == "done":  # done before its record was written: it was not
        begun = bool(lines or record)
        state = "running" if lock.is_held(folder) else "stopped" if begun else "not started"
    limit = Limit.of(cell.settings.training)
    spent = getattr(lines[-1], limit.kind) if lines else None
    share = None if spent is None else min(spent / limit.amount, 1.0)
    return _measured(State(cell.key, state, why, task), lines, share)


def _measured(state: State, lines: list[_Line], share: float | None) -> State:
    """The state with what the last lines of metrics.jsonl say. share: of the limit, so far."""
    if not lines:
        return state
    first, last = lines[0], lines[-1]
    share = 1.0 if state.state == "done" else share
    spent = last.seconds - first.seconds
    speed = (last.seen_tokens - first.seen_tokens) / spent if spent > 0 else None
    left = last.seconds * (1 - share) / share if share else None
    used = [line.mfu for line in lines if line.mfu is not None]
    return replace(
        state,
        step=last.step,
        share=share,
        loss=last.loss,
        tokens_per_second=speed or last.tokens_per_second,
        seconds_left=left if state.state in ("running", "waiting", "stopped") else None,
        mfu=sum(used) / len(used) if used else None,
        peak_memory=last.peak_memory,
    )


def _last_lines(path: Path) -> list[_Line]:
    """The last steps in metrics.jsonl; a line that is being written or damaged is left out."""
    try:
        with open_regular(path) as file:
            size, tail = file.seek(0, 2), TAIL
            while True:
                begin = max(0, size - tail)
                file.seek(begin)
                found = _steps(file.read().decode(errors="replace"), whole=begin == 0)
                if len(found) > RECENT or begin == 0:
                    return found[-RECENT - 1 :]
                tail *= 8  # what is damaged may be long
    except FileNotFoundError:
        return []


def _steps(text: str, whole: bool) -> list[_Line]:
    """The sound lines of a text. whole: whether it begins with a line's begin."""
    found = []
    for line in text[: text.rfind("\n") + 1].splitlines()[0 if whole else 1 :]:
        with suppress(ValidationError):
            found.append(_Line.model_validate(parse_line(line)))
    return found


def table(states: list[State]) -> str:
    """For a terminal: a line a cell or job, and below it why it failed or is not run."""
    words = [_words(s) for s in states]
    names, says = (max(map(len, [*column, ""])) for column in ([s.name for s in states], words))
    head = (
        f"{'':<{names}}  {'state':<{says}}{'step':>8}{'done':>6}{'loss':>8}{'tok/s':>11}{'left':>9}"
    )
    on_gpus = any(s.peak_memory is not None for s in states)
    lines = [head + f"{'MFU':>7}{'GB':>7}" * on_gpus]
    for s, word in zip(states, words, strict=True):
        lines.append(
            f"{s.name:<{names}}  {word:<{says}}"
            f"{'-' if s.step is None else s.step:>8}"
            f"{'-' if s.share is None else f'{s.share:.0%}':>6}"
            f"{'-' if s.loss is None else f'{s.loss:.3f}':>8}"
            f"{'-' if s.tokens_per_second is None else f'{s.tokens_per_second:,.0f}':>11}"
            f"{'-' if s.seconds_left is None else clock(s.seconds_left):>9}"
            + (
                f"{'-' if s.mfu is None else f'{s.mfu:.1%}':>7}"
                f"{'-' if s.peak_memory is None else f'{s.peak_memory / 1e9:.1f}':>7}"
            )
            * on_gpus
        )
        if s.state in ENDED and s.why:
            lines.append(f"  {s.task}: {s.why}")
    return "\n".join(lines)


def _words(state: State) -> str:
    return state.state if state.state in ENDED or not state.why else f"{state.state} ({state.why})"
