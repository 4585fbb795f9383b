"""Tasks: files `NAME.task.yaml` that say where items are and how they are asked.

    summary: Which of four sentences comes next?
    data: {documentation: next_sentence}          # or {train: a.jsonl, test: b.jsonl}
    wordings:
      - {name: plain, prompt: "{{ text }} ||| {{ answer_choices[label] }}", choices: "..."}
    promptsource: templates.yaml                  # wordings of a file of promptsource, or beside ours

As a data source (`data.source`), such a file or a folder of them is {input, target} pairs of the
items to train on, each in every wording. Held-out items are scored by evaluation/tasks.py.
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megaarch.config.load import read_yaml
from megaarch.errors import UserError
from megaarch.files import first_fault, inside, read_text
from megaarch.ingest.tasks import documentation, promptsource
from megaarch.ingest.tasks.template import Fields, Question, Wording, with_shots

ENDING = ".task.yaml"
Text = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Wording(_Part):
    name: Text
    prompt: Text
    choices: Text | None = None


class _Items(_Part):
    """documentation: a name of documentation.TASKS. train, test: JSON lines beside the task's file."""

    documentation: Text | None = None
    train: Text | None = None
    test: Text | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.documentation is None) == (self.test is None):
            raise ValueError("give either documentation, or test and perhaps train")
        return self


class _File(_Part):
    summary: Text
    data: _Items
    wordings: tuple[_Wording, ...] = Field(default=(), strict=False)
    promptsource: Text | None = None


class Task:
    """A task as its file says it. UserError for a file that cannot be read or says something else."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name.removesuffix(ENDING)
        try:
            self.file = _File.model_validate(read_yaml(path))
        except ValidationError as error:
            raise UserError(f"{path}: {first_fault(error)}") from None
        self.wordings = [Wording(self.name, **dict(own)) for own in self.file.wordings]
        if self.file.promptsource is not None:
            source = inside(path.parent, self.file.promptsource)
            self.wordings += promptsource.wordings(self.name, source)
        names = [wording.name for wording in self.wordings]
        if not names or len(set(names)) < len(names):
            raise UserError(f"{path}: wordings: give one or more, each with a name of its own")

    @property
    def inputs(self) -> list[Path]:
        """The files that its items come from, itself included."""
        given = [self.file.data.train, self.file.data.test, self.file.promptsource]
        return [self.path, *(inside(self.path.parent, name) for name in given if name)]

    @cached_property
    def train(self) -> Sequence[Fields]:
        """The items to train on and to take examples of a prompt from."""
        return self._items(self.file.data.train, held_out=False)

    @cached_property
    def test(self) -> Sequence[Fields]:
        """The held-out items."""
        return self._items(self.file.data.test, held_out=True)

    def _items(self, records: str | None, held_out: bool) -> Sequence[Fields]:
        if self.file.data.documentation:
            return documentation.items(self.file.data.documentation, held_out)
        return self._records(records) if records else []

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields (input, target) of each item to train on in each wording."""
        for fields in self.train:
            for wording in self.wordings:
                if question := wording.question(fields):
                    yield question.input, question.target

    def questions(self, wording: Wording, number: int, shots: int) -> list[Question | None]:
        """Returns the first held-out items as questions after `shots` examples, drawn of the items to
        train on by the item's place; None where the wording does not suit an item."""
        if shots > len(self.train):
            raise UserError(
                f"task {self.name}: {shots} examples were asked for, and it has {len(self.train)} "
                "items to train on: lower study.evaluation.shots"
            )
        asked = []
        for place, fields in enumerate(self.test[:number]):
            question = wording.question(fields)
            if question and shots:
                question = with_shots(question, self._shots(wording, place, shots))
            asked.append(question)
        return asked

    def _shots(self, wording: Wording, place: int, number: int) -> list[Question]:
        found = map(wording.question, shuffled(self.train, f"{self.name} {place}"))
        return list(islice(filter(None, found), number))

    def _records(self, name: str) -> Sequence[Fields]:
        path = inside(self.path.parent, name)
        records: list[dict[str, Any]] = []
        for number, line in enumerate(read_text(path).split("\n"), 1):  # text may hold U+2028
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: it is no JSON ({error})") from None
            if record is not None and not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: one JSON object a line is expected")
            records += [record] if record else []
        if not records:
            raise UserError(f"{path} has no record")
        return records


def shuffled(items: Sequence[Any], seed: str) -> Iterator[Any]:
    """Yields all items in random order (Fisher and Yates), each drawn when it is asked for."""
    rng, moved = random.Random(seed), {}
    for last in reversed(range(len(items))):
        place = rng.randrange(last + 1)
        yield items[moved.get(place, place)]
        moved[place] = moved.get(last, last)


def find(path: str) -> list[Task]:
    """Returns the tasks of a file or folder, in the order of their names. UserError where there are
    none."""
    root = Path(path)
    files = sorted(root.glob(f"*{ENDING}")) if root.is_dir() else [root]
    if not files or not all(file.is_file() and file.name.endswith(ENDING) for file in files):
        raise UserError(
            f"{path} is no task and no folder of tasks, whose files end in {ENDING}: a task of "
            "lm-evaluation-harness goes by its name, with its folder as the include path"
        )
    return [Task(file) for file in files]
