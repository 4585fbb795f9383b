"""The records of a study, as their JSON files hold them: one model each.

cell.json     CellRecord   what decided a cell's result, and the result or what a trial found
rates.json    Sweep        the trials of a sweep and what they chose
results.json  Results      all finished cells: what the report is a function of
*.jsonl       CurvePoint, LossPoint   a line of heldout.jsonl and of metrics.jsonl

Files of other versions load: keys that this version does not know are kept and written again, and
what an earlier one did not write has a default. A number that is NaN or infinite is read as None.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from megaarch.config import Raw
from megaarch.errors import UserError
from megaarch.evaluation.heldout_scores import Heldout, Paired
from megaarch.evaluation.record_schema import Amount, Count, Machine, Number, Record
from megaarch.files import first_fault, fit, read_json, write_json
from megaarch.study.sweep_grid import RATE, Choice
from megaarch.training.metrics import read_lines

log = logging.getLogger(__name__)


class Environment(Machine):
    """Where a cell ran. threads: of its process. lanes: how many cells ran side by side.
    fingerprint: of its data. tokenizer: the fingerprint of its tokenizer."""

    threads: int | None = None
    lanes: int | None = None
    fingerprint: str | None = None
    tokenizer: str | None = None


class Point(Record):
    """Where a run stood: seconds of training, FLOPs spent."""

    model_config = ConfigDict(extra="ignore")
    step: Amount
    flops: Amount
    seconds: Amount


class CurvePoint(Point):
    heldout: Number


class LossPoint(Point):
    loss: Number  # None for a skipped step


class Mask(Record):
    """An attention mask by its parts: each a shape, a range of queries and a range of keys."""

    title: str
    queries: Annotated[Count, Field(gt=0)]
    keys: Annotated[Count, Field(gt=0)]
    parts: list[Annotated[list[Count], Field(min_length=5, max_length=5)]]

    @model_validator(mode="after")
    def _parts_within(self) -> Self:
        for _, q0, q1, k0, k1 in self.parts:
            if not (q0 <= q1 <= self.queries and k0 <= k1 <= self.keys):
                raise ValueError("a part is not within the mask")
        return self


class Text(Record):
    """The text of a study or of a cell: the counts of its preparation's manifest.

    excluded_*: what a cell's own text had of what the study holds out, and what was left out of it.
    """

    OF_A_CELL: ClassVar = (
        *("source", "train_documents", "train_tokens"),
        *("excluded_documents", "excluded_paragraphs"),
    )
    source: str | None = None
    tokenizer: str | None = None
    fingerprint: str | None = None
    train_documents: Number = None
    train_tokens: Number = None
    heldout_documents: Number = None
    heldout_bytes: Number = None
    dropped_paragraphs: Number = None
    excluded_documents: Number = None
    excluded_paragraphs: Number = None
    bytes_per_token: Number = None


class RateLaw(Record):
    """A law of learning rates (study/rate_law.py): log rate is linear in the logs of the parameters without
    embeddings and of the budget. places: that it is fitted to. scatter: the factor by which their best rates lie
    about it (a standard deviation). largest: the most parameters of
    them, with the rate key of the largest place."""

    places: Count
    scatter: Amount
    constant: float
    parameters: float
    budget: float
    largest: Amount
    largest_place: str | None = None


class Extrapolation(Record):
    """How far a cell's rate lies from what was swept. places, scatter: of its law (RateLaw). times: its parameters
    over the most of them. same_batch: whether they were swept with its tokens a step."""

    places: Count
    scatter: Amount
    times: Amount
    same_batch: bool = True

    def __str__(self) -> str:
        batch = "" if self.same_batch else " and with another batch"
        return (
            f"swept at {self.places} sizes or budgets{batch}, which lie within a factor of "
            f"{self.scatter:.2f} of their law, for {self.times:.2g} times their parameters"
        )


class CellResult(Record):
    """One cell of results.json.

    adaptation: what it adds to its parent where study.adapt made it, in the budget's unit.
    inherited_flops, inherited_tokens: what all its ancestors spent and saw, None where that is not known. tuned,
    learning_rate_at_edge, more_at_edge, trial_flops, extrapolation: what a sweep knows of it (`sweep.verdict`).
    settings: as a configuration has them. digest: of its record (`CellRecord.digest`); None: an earlier
    version wrote it.
    """

    name: str
    key: str | None = None
    preset: str | None = None
    architecture: str
    objective: str
    size: str | None = None
    budget: Amount
    seed: int
    parent: str | None = None
    adaptation: Number = None
    parameters: Number
    non_embedding_parameters: Number = None
    flops: Number
    inherited_flops: Number = None
    inherited_tokens: Number = None
    palm_flops: Number = None
    seen_tokens: Number
    target_tokens: Number
    steps: Number
    train_seconds: Number
    tokens_per_second: Number
    padding_share: Number = None
    truncated_share: Number = None
    epochs: Number = None
    skipped_steps: Number = None
    final_loss: Number
    precision: str | None = None
    learning_rate: Number = None
    heldout: Heldout
    curve: list[CurvePoint]
    losses: list[LossPoint]
    masks: list[Mask]
    settings: Raw
    data: Text | None = None
    tuned: bool = False
    learning_rate_at_edge: bool = False
    more_at_edge: list[str] = Field(default_factory=list)
    trial_flops: Number = None
    extrapolation: Extrapolation | None = None
    environment: Environment = Environment()
    digest: str | None = None

    @property
    def bits_per_byte(self) -> float | None:
        """Held-out bits per byte of the continuation."""
        return self.heldout.continuation_bits_per_byte

    def section(self, name: str) -> dict[str, Any]:
        """A section of its settings; empty where there is none."""
        found = self.settings.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def start(self) -> str | None:
        """Whose weights it starts from: the key of a cell, or a checkpoint from outside the study."""
        given = self.section("training").get("start_from")
        return self.parent or (str(given) if given else None)

    @property
    def start_known(self) -> bool:
        """Whether all is counted that was spent on the weights that it starts from, if on any."""
        return self.start is None or bool(self.inherited_flops or self.inherited_tokens)

    @property
    def total_flops(self) -> float | None:
        """Training FLOPs behind the cell's values: its own and those of the weights it starts from."""
        return None if self.flops is None else self.flops + (self.inherited_flops or 0.0)

    @property
    def total_tokens(self) -> float | None:
        """Seen tokens behind the cell's values, as `total_flops`."""
        return None if self.seen_tokens is None else self.seen_tokens + (self.inherited_tokens or 0)


class Trial(Record):
    """The finding of a trial. more: what else than the rate was tried (study/sweep_grid.py). heldout: bits
    per byte, None where it diverged. parameters: without embeddings. budget: its own, in the study's unit; an
    earlier version wrote neither."""

    cell: str
    key: str | None = None
    rate_key: str | None = None
    learning_rate: Amount
    more: dict[str, int | float] = Field(default_factory=dict)
    heldout: Number
    flops: Amount
    parameters: Number = None
    budget: Number = None

    @property
    def choice(self) -> Choice:
        return {RATE: self.learning_rate, **self.more}


class Divergence(Record):
    """Why a cell has no result: its loss or gradient was not finite in more than `skip_limit` steps in a row, up
    to `step`; or the cell that it starts from, of key `parent`, has none. said: the sentence."""

    said: str
    step: Count = 0
    skip_limit: Count = 0
    parent: str | None = None


class DivergedCell(Record):
    """A cell that has no entry in results.json, for it diverged, or what it starts from."""

    name: str
    key: str
    size: str | None = None
    budget: Amount
    adaptation: Number = None
    seed: int
    divergence: Divergence


def without_seed(cell: CellResult | DivergedCell) -> tuple[str, str | None, float]:
    """Returns what the seeds of one cell share: its name, size and budget."""
    return cell.name, cell.size, cell.budget


class CellRecord(Record):
    """cell.json. A cell that has not ended has neither result, trial nor divergence. signature: the settings,
    data and yardsticks that decide its result."""

    signature: dict[str, Any]
    key: str | None = None
    result: CellResult | None = None
    trial: Trial | None = None
    diverged: Divergence | None = None
    environment: Environment = Environment()

    @property
    def digest(self) -> str:
        """A short text of what was run and of this run of it: what looked at a run tells by it whether that has been
        made anew since."""
        found = self.result
        run = None if found is None else [found.final_loss, found.train_seconds]
        text = json.dumps([self.signature, run], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def get_result(self) -> CellResult:
        """The result of a cell that is finished."""
        assert self.result is not None
        return self.result

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a cell's folder, None where there is none yet."""
        path = folder / "cell.json"
        if not path.exists():
            return None
        try:
            return fit(read_json(path), cls, path)
        except ValueError as error:
            raise UserError(f"{error}: remove its folder to run the cell again") from None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cell.json", self.as_json())


class Sweep(Machine):
    """rates.json. best: the rate of each cell by its rate key, and by its name. more: what else was
    chosen for it. laws: of the rates of each cell name, for sizes and budgets that were not swept; match: the
    unit of their budgets. settings: those that a cell must share with the trials to take their choice."""

    grid: Annotated[list[float], Field(min_length=1)]
    trial_budget_share: Number = None
    command: str | None = None
    best: dict[str, float]
    more: dict[str, dict[str, int | float]] = Field(default_factory=dict)
    laws: dict[str, RateLaw] = Field(default_factory=dict)
    match: str | None = None
    trials: list[Trial]
    settings: dict[str, dict[str, Any]]

    @property
    def chosen(self) -> dict[str, Choice]:
        """Each cell's choice, by its rate key and by its name."""
        return {name: {RATE: rate, **self.more.get(name, {})} for name, rate in self.best.items()}

    @classmethod
    def read(cls, path: str) -> Self:
        """The file that `study.rates` names."""
        try:
            return fit(read_json(path), cls, path)
        except OSError as error:
            raise UserError(f"study.rates: cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(
                f"study.rates: {path} is not the rates.json of a sweep: {error}"
            ) from None


class Budget(Record):
    match: str
    amounts: list[Amount]


class Results(Machine):
    """results.json."""

    format: Literal[1]
    study: str
    created: str | None = None
    command: str | None = None
    budget: Budget
    data: Text | None = None
    unigram_bits_per_byte: Number = None
    unigram_paired: Paired | None = None
    curve_unigram_bits_per_byte: Number = None
    chance: Amount = 0.25
    cells: Annotated[list[CellResult], Field(min_length=1)]
    diverged: list[DivergedCell] = Field(default_factory=list)
    tuning: list[Trial] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, found: Any, where: str | Path = "results.json") -> Self:
        """From what the file says. UserError names the first key that does not fit."""
        if isinstance(found, cls):
            return found
        return fit(found, cls, f"{where} is not a results.json of this version, or")

    @classmethod
    def read(cls, path: Path) -> Self:
        """From the file. FileNotFoundError where there is none."""
        try:
            return cls.of(read_json(path), path)
        except UserError as error:
            raise UserError(f"{error}: run megaarch compare again") from None


Line = TypeVar("Line", bound=Point)


def read_points(path: Path, form: type[Line]) -> Iterator[Line]:
    """The lines of a run's JSON lines file. One that is damaged is left out with a warning."""
    for line in read_lines(path):
        try:
            yield form.model_validate(line)
        except ValidationError as error:
            fault = first_fault(error)
            log.warning("%s: step %d is damaged and left out: %s", path, line["step"], fault)
