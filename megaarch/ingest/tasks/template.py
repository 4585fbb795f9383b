"""Wordings of a task: a record of fields to the text of a question and of its answers.

    prompt:   "{{ text }}\nWhat comes next? ||| {{ answer_choices[label] }}"     input ||| target
    choices:  "{{ first }} ||| {{ second }}"                                     or None

This is the notation of promptsource (Bach et al. 2022), whose templates can be read as they are
(promptsource.py). Templates are jinja in a sandbox (sandbox.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megaarch.errors import UserError
from megaarch.ingest.tasks.sandbox import render

BAR = "|||"
LARGEST = 1 << 20  # characters of a question
BETWEEN = "\n\n"  # examples of a prompt

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A rendered item. choices: those of a rank classification, () where any text may answer;
    answer: the place of the right one. examples: the answered ones that its input begins with."""

    input: str
    target: str
    choices: tuple[str, ...] = ()
    answer: int | None = None
    examples: tuple[str, ...] = ()

    def shorter(self) -> Iterator[str]:
        """Yields its input without its first example, without its first two, and so on to none."""
        text = self.input
        for example in self.examples:
            text = text.removeprefix(example)
            yield text


@dataclass(frozen=True)
class Wording:
    """One way to ask. task: its name, for errors."""

    task: str
    name: str
    prompt: str
    choices: str | None = None

    def question(self, fields: Fields) -> Question | None:
        """Renders an item; None where its target is empty, with which promptsource says that the
        wording does not suit the item.

        UserError: a template that does not parse or names a field that the item lacks; choices that
        do not hold the target.
        """
        choices: tuple[str, ...] = ()
        if self.choices is not None:
            choices = tuple(part.strip() for part in self._render(self.choices, fields).split(BAR))
        known = dict(fields) | ({"answer_choices": list(choices)} if choices else {})
        parts = self._render(self.prompt, known).split(BAR)
        if len(parts) != 2:
            raise UserError(
                f"{self}: a prompt is input {BAR} target, and this one has {len(parts)} parts"
            )
        asked, target = (part.strip() for part in parts)
        if not target:
            return None
        if not choices:
            return Question(asked, target)
        if len(set(choices)) < len(choices) or target not in choices:
            raise UserError(
                f"{self}: the target {target!r} must be one of its choices, which differ: "
                f"{', '.join(map(repr, choices))}"
            )
        return Question(asked, target, choices, choices.index(target))

    def _render(self, source: str, fields: Fields) -> str:
        try:
            return render(source, fields, LARGEST)
        except UserError as error:
            raise UserError(f"{self}: {error}") from None

    def __str__(self) -> str:
        return f"task {self.task}, wording {self.name}"


def with_shots(question: Question, shots: Sequence[Question]) -> Question:
    """The question after answered examples."""
    before = tuple(f"{shot.input} {shot.target}{BETWEEN}" for shot in shots)
    return replace(question, input="".join(before) + question.input, examples=before)
