"""Wordings of a task: a record of fields to the text of a question and of its answers.

    prompt:   "{{ text }}\nWhat comes next? ||| {{ answer_choices[label] }}"     input ||| target
    choices:  "{{ first }} ||| {{ second }}"                                     or None

This is the notation of promptsource (Bach et al. 2022), whose templates can be read as they are
(promptsource.py). Templates are jinja in a sandbox: they reach no attribute, module or file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megaarch.errors import UserError

BAR = "|||"
LARGEST = 1 << 20  # characters of a question
BETWEEN = "\n\n"  # examples of a prompt

Fields = Mapping[str, Any]


class _Sandbox(ImmutableSandboxedEnvironment):
    """No operator that makes a text or number of any size out of a short template."""

    intercepted_binops = frozenset(["**", "*"])

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        both_numbers = all(isinstance(x, int | float) for x in (left, right))
        if operator == "**" or not both_numbers:
            raise SecurityError(f"the operator {operator} is not for templates")
        return super().call_binop(context, operator, left, right)


ENVIRONMENT = _Sandbox(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
ENVIRONMENT.globals["zip"] = zip
ENVIRONMENT.filters["choice"] = lambda values: values[0]  # promptsource draws one


@dataclass(frozen=True)
class Question:
    """A rendered item. choices: those of a rank classification, () where any text may answer;
    answer: the place of the right one."""

    input: str
    target: str
    choices: tuple[str, ...] = ()
    answer: int | None = None


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
            text = "".join(self._pieces(source, fields))
        except jinja2.TemplateError as error:
            raise UserError(f"{self}: {error.message}") from None
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise UserError(f"{self}: {error} in {source[:60]!r}") from None
        return text

    def _pieces(self, source: str, fields: Fields):
        size = 0
        for piece in parsed(source).generate(fields):
            size += len(piece)
            if size > LARGEST:
                raise jinja2.TemplateError(f"it makes more than {LARGEST:,} characters")
            yield piece

    def __str__(self) -> str:
        return f"task {self.task}, wording {self.name}"


@lru_cache(maxsize=1024)
def parsed(source: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(source)


def with_shots(question: Question, shots: Sequence[Question]) -> Question:
    """The question after answered examples."""
    before = [f"{shot.input} {shot.target}{BETWEEN}" for shot in shots]
    return Question(
        "".join(before) + question.input, question.target, question.choices, question.answer
    )
