"""The probes that `megaarch probe` runs, a row each, and how a probe of several runs is put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from megaarch.config.registry import load
from megaarch.evaluation.record_schema import Record
from megaarch.files import fit, read_json, write_json
from megaarch.probes.estimate import Estimate, merged
from megaarch.probes.probed_model import Subject, open_subject


@dataclass(frozen=True)
class Options:
    """rows: of held-out text, at most. length: tokens of a row; None: the run's own, 128 at most.
    seed: of what a probe draws. tasks: files NAME.task.yaml, or folders of them, for probes of tasks."""

    rows: int = 32
    length: int | None = None
    seed: int = 0
    tasks: tuple[str, ...] = ()

    def length_of(self, subject: Subject) -> int:
        """Returns the tokens of a row for a subject. A row leaves room for marks of its form."""
        return self.length or min(128, subject.settings.model.sequence_length * 3 // 4)


@dataclass(frozen=True)
class Probe:
    """A probe whose file has a function `measure` of (Subject, Options), or of (Options) alone where it looks at no
    run, which returns a record of the class `record`."""

    module: str
    record: str
    of_runs: bool = True

    def load(self, name: str) -> Any:
        """Returns what its file calls `name`."""
        return load(f"megaarch.probes.{self.module}:{name}")


PROBES = {
    "rank": Probe("attention_rank", "Ranks"),
    "position": Probe("position", "Positions"),
    "difficulty": Probe("difficulty", "Difficulty"),
    "in_context": Probe("in_context", "InContext"),
    "dialogue": Probe("dialogue", "Dialogue"),
    "regression": Probe("in_context_regression", "Regressed", of_runs=False),
    "masks": Probe("mask_speed", "Throughput", of_runs=False),
}
ALONE = "all"


class Probed(Record):
    """What a probe found: a file of STUDY/probes/. cells: a record of the probe's class for each name,
    whose runs differ in their seed alone; of a probe that looks at no run, under ALONE. digests: of the
    runs of each name."""

    probe: str
    rows: int
    length: int | None = None
    seed: int = 0
    cells: dict[str, Any]
    digests: dict[str, list[str]] = Field(default_factory=dict)

    def of_cell(self, name: str, key: str | None, digests: Sequence[str] = ()) -> Any:
        """Returns the record of a study's cell, by its key; None where it was not probed, or where a run was that is
        none of the cell's: it has been made anew since, or left out. Files of an earlier version have names alone.

        digests: of the cell's runs; none: they are not known.
        """
        seedless = (key or "").rpartition("-seed")[0]
        if digests and not set(self.digests.get(seedless, ())) <= set(digests):
            return None
        return self.cells.get(seedless) or self.cells.get(name)


def run(
    name: str,
    runs: Sequence[Path],
    options: Options,
    overrides: Sequence[str] = (),
    show: Callable[[str], None] = lambda words: None,
) -> Probed:
    """Probes runs, and puts those together that share a name. show: is told what begins. A probe that looks
    at no run is given none.

    UserError for a run that cannot be opened, and for one that the probe cannot measure.
    """
    measure: Callable[..., Record] = PROBES[name].load("measure")
    found: dict[str, list[Record]] = {}
    digests: dict[str, list[str]] = {}
    if not PROBES[name].of_runs:
        found[ALONE] = [measure(options)]
    for path in runs:
        show(f"{name}: {path}")
        subject = open_subject(path, overrides)
        found.setdefault(subject.name, []).append(measure(subject, options))
        if subject.digest:
            digests.setdefault(subject.name, []).append(subject.digest)
    return Probed(
        probe=name,
        rows=options.rows,
        length=options.length,
        seed=options.seed,
        cells={cell: merged(records) for cell, records in found.items()},
        digests=digests,
    )


def read(folder: Path) -> dict[str, Probed]:
    """Returns what was probed of a study in `folder`, by the probe's name, with typed records."""
    found = {}
    for name, probe in PROBES.items():
        path = folder / "probes" / f"{name}.json"
        if path.exists():
            made = fit(read_json(path), Probed, path)
            kind: type[Record] = probe.load(probe.record)
            cells = {cell: fit(value, kind, path) for cell, value in made.cells.items()}
            found[name] = made.model_copy(update={"cells": cells})
    return found


def write(folder: Path, probed: Probed) -> Path:
    """Writes what was probed of the study in `folder`; returns the file."""
    path = folder / "probes" / f"{probed.probe}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, probed.model_dump(mode="json"))
    return path


def estimates(record: Any, path: str = "") -> list[tuple[str, Estimate]]:
    """Returns every estimate in a record with its path, e.g. ("layers[0].effective_rank", ...)."""
    if isinstance(record, Estimate):
        return [(path, record)]
    dot = "." if path else ""
    if isinstance(record, Record):
        fields = type(record).model_fields
        parts = [(f"{path}{dot}{name}", getattr(record, name)) for name in fields]
    elif isinstance(record, dict):
        parts = [(f"{path}{dot}{key}", value) for key, value in record.items()]
    elif isinstance(record, list):
        parts = [(f"{path}[{i}]", value) for i, value in enumerate(record)]
    else:
        return []
    return [each for where, value in parts for each in estimates(value, where)]
