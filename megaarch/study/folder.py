"""A study in its folder: its configuration, its cells, and which of them are finished.

study.yaml                      the configuration, for jobs of their own and for readers
rates.json, results.json        what a sweep chose; all finished cells
cells/NAME/SIZE-BUDGET-seedN/   cell.json      settings and, once finished, the result
                                heldout.jsonl  the held-out value along the run
                                metrics.jsonl, checkpoints/, tensorboard/
                                tune/          the trials of a sweep on it; a finished one keeps no checkpoint
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.fingerprint import SCORING, changed_settings, fingerprint
from megaarch.config.schema import Data, Study, Tune
from megaarch.errors import UserError
from megaarch.evaluation import tasks
from megaarch.evaluation.items import Item, split
from megaarch.evaluation.scorer import ROOM_BEHIND, Room, form_marks
from megaarch.files import replacing
from megaarch.ingest.prepared_data import Prepared
from megaarch.study import data, rate_law, start
from megaarch.study.cells import StudyCell, expand
from megaarch.study.results import CellRecord, Sweep, Trial

# the settings of study.evaluation that decide the last scores of a cell and no point of its curve
SCORED_LAST = {
    SCORING + name
    for name in (
        *("documents", "choices", "middles", "lengths", "by_length"),
        *("tasks", "tasks.room", "tasks.choices", "task_items", "shots", "include_path"),
    )
}


@dataclass(frozen=True)
class StudyFolder:
    """A study and the folder that it runs in.

    base: the study's own data settings. sweep: whose rates the cells have, None where the
    configuration's stand.
    """

    raw: config.Raw
    directory: Path
    study: Study
    base: Data
    vocabulary_size: int
    cells: list[StudyCell]
    sweep: Sweep | None

    @classmethod
    def open(cls, raw: config.Raw, directory: Path) -> Self:
        """ConfigError where the configuration is no study's or a cell is at fault, UserError where
        the file of `study.rates` cannot be used."""
        cells, settings = expand(raw, directory), config.resolve(raw)
        study, size = settings.study, settings.model.vocabulary_size
        assert study is not None, "expand refuses what is no study"
        folder = cls(raw, directory, study, settings.data, size, cells, None)
        return folder.with_choices(Sweep.read(study.rates)) if study.rates else folder

    def with_choices(self, sweep: Sweep) -> Self:
        """Returns the study with what a sweep chose, and what its laws choose for cells that it did not hold."""
        chosen = sweep.chosen | rate_law.choices(sweep, self.cells)
        return replace(self, sweep=sweep, cells=expand(self.raw, self.directory, chosen))

    def text_of(self, cell: StudyCell) -> Prepared:
        """Returns what a cell trains on."""
        return data.text_of(cell, self.base)

    @property
    def text(self) -> Prepared:
        """The study's own text, from which held-out items are cut."""
        return data.own_text(self.base, self.vocabulary_size)

    def held_out(self, size: int | None = None) -> dict[str, list[Item]]:
        """The items that score every cell, cut from the study's own text. size: of a cell's vocabulary; None:
        of the study's."""
        size = size or self.vocabulary_size
        prepared = data.own_text(self.base, size)
        return split(prepared.heldout, prepared.tokenizer, self.study.evaluation)

    @cached_property
    def room(self) -> Room:
        """The room of prompts, one for all cells."""
        cells = {(cell.name, cell.size): cell.settings for cell in self.cells}.values()
        sizes = {settings.model.vocabulary_size for settings in cells}
        words = {n: data.own_text(self.base, n).tokenizer.vocabulary for n in sizes}
        return Room([(settings, words[settings.model.vocabulary_size]) for settings in cells])

    @property
    def tune(self) -> Tune:
        """What is swept, where anything is."""
        assert self.study.tune is not None
        return self.study.tune

    def finished(
        self, cell: StudyCell, parent: dict[str, Any] | None = None, but: Collection[str] = ()
    ) -> CellRecord | None:
        """The record of a cell that is done: that has a result, or diverged. ConfigError where what decides
        it has changed since.

        parent: the identity of its parent; None: that with which it was run. Where it was not, the cell
        is not done either. but: settings, its ancestors' too, that a sweep has yet to choose.
        """
        record = CellRecord.read(cell.folder)
        if record is None or (cell.parent and parent is None and not start.parent_record(cell)):
            return None
        if record.diverged and record.diverged.parent:  # nothing was run
            return record if start.has_ended(cell, record) else None
        unscored = record.result is None
        before, now = (
            {
                key: value
                for key, value in each.items()
                if key.rpartition("from.")[2] not in but
                and not (unscored and key.startswith(SCORING))
            }
            for each in (record.signature, self.identity(cell, parent))
        )
        if differences := changed_settings(before, now):
            remedy = f"give the cell another name, or remove its folder {cell.folder}"
            if differences.keys() <= SCORED_LAST:
                remedy = f"or remove {cell.folder}/cell.json: its weights stay and are scored anew"
            told = f"cell {cell.key} was run with other settings: {'; '.join(differences.values())}"
            raise config.ConfigError([f"{told}. Restore them, {remedy}"])
        return record if start.has_ended(cell, record) else None

    def identity(self, cell: StudyCell, parent: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns all that decides a cell's result, or what a trial finds: its settings, data and yardsticks, and all
        that decides its parent's, or the checkpoint from outside that it starts from.

        parent: the parent's identity; None: that with which it was run.
        """
        prepared, evaluation = self.text_of(cell), self.study.evaluation
        scoring = {SCORING + k: v for k, v in evaluation.model_dump(mode="json").items()}
        about = {"data": prepared.fingerprint, "from": cell.parent}
        room = None
        if evaluation.tasks:
            scoring[f"{SCORING}tasks"] = tasks.identity(evaluation)
            if cell.choice is None:  # earlier versions did not record it, nor give all cells alike
                room = self.room
                scoring[f"{SCORING}tasks.room"] = [room(behind) for behind in ROOM_BEHIND]
        marks = form_marks(cell.settings, prepared, evaluation, room)
        scoring |= {SCORING + name: value for name, value in marks.items()}
        about |= start.identity(cell)
        if cell.parent:
            record = start.parent_record(cell)
            parent = parent or (record.signature if record else {})
            kept = {key: value for key, value in parent.items() if not key.startswith(SCORING)}
            about |= {f"from.{key}": value for key, value in kept.items()}
        if cell.choice and catalogue.OBJECTIVES[cell.settings.data.objective].of_pairs:
            # once such trials were scored on text, and then on targets behind inputs cut to less than rows hold, or
            # to their last tokens
            about["validation"] = "targets as trained"
        return fingerprint(cell.settings) | scoring | about

    def finished_trial(self, trial: StudyCell) -> Trial | None:
        """Returns what a finished trial found; None where it is not done, or was run with other settings."""
        record = CellRecord.read(trial.folder)
        same = record and not changed_settings(record.signature, self.identity(trial))
        return record.trial if record and same else None


def save_config(raw: config.Raw, directory: Path) -> None:
    """Keeps a study's configuration as study.yaml in its folder."""
    text = yaml.safe_dump(raw, sort_keys=False)
    path = directory / "study.yaml"
    if path.exists() and path.read_text() == text:
        return
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(text)


def load_config(directory: Path) -> config.Raw:
    """Returns what `save_config` kept. UserError where the folder is no study's."""
    path = directory / "study.yaml"
    if not path.exists():
        raise UserError(
            f"{directory} is no study's folder: give one that megaarch compare or submit has made"
        )
    return config.read_yaml(path)
