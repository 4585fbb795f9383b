"""Scores of tasks by rank classification (Brown et al. 2020; Sanh et al. 2022): the answer is the choice
that the model gives the largest probability after the question, in its own conditional form.

An item counts by the share of its wordings in which the right choice wins, so that an interval over
items is one over what was asked and not over how.
"""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from megaarch.config.schema import Evaluation
from megaarch.data.tokenizer import Tokenizer
from megaarch.ingest.tasks.task import Task, find
from megaarch.ingest.tasks.template import Question
from megaarch.study.intervals import ratio_interval
from megaarch.study.results import TaskScore
from megaarch.study.score import Scorer

FORM = 8  # tokens that a conditional form adds at most (specials, a mode, sentinels)

Pair = tuple[np.ndarray, np.ndarray]


def tasks_of(evaluation: Evaluation) -> list[Task]:
    """The tasks of a study. UserError for a file that is none."""
    return [task for path in evaluation.tasks for task in find(path)]


def identity(evaluation: Evaluation) -> dict[str, str]:
    """Maps each task's name to a digest of all that its items come from."""
    found = {}
    for task in tasks_of(evaluation):
        content = b"\0".join(path.read_bytes() for path in task.inputs)
        found[task.name] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found


def score(scorer: Scorer, tokenizer: Tokenizer, evaluation: Evaluation) -> dict[str, TaskScore]:
    """Returns the score of each task by its name."""
    return {task.name: _score(scorer, tokenizer, task, evaluation) for task in tasks_of(evaluation)}


def _score(scorer: Scorer, tokenizer: Tokenizer, task: Task, evaluation: Evaluation) -> TaskScore:
    asked = {
        wording.name: task.questions(wording, evaluation.task_items, evaluation.shots)
        for wording in task.wordings
    }
    pairs = [
        pair
        for questions in asked.values()
        for question in filter(None, questions)
        for pair in tokens(scorer, tokenizer, question)
    ]
    logs = iter(scorer.loglikelihoods(pairs).raw)
    right: dict[str, list[tuple[bool, bool] | None]] = {
        name: [question and _is_right(question, logs) for question in questions]
        for name, questions in asked.items()
    }
    items = [[one for one in of_item if one] for of_item in zip_longest(*right.values())]
    plain, normalized = (
        [float(np.mean([one[kind] for one in of_item])) for of_item in items if of_item]
        for kind in (0, 1)
    )
    number = len(plain)
    if not number:
        return TaskScore(accuracy=None)
    questions = [question for each in asked.values() for question in each if question]
    return TaskScore(
        accuracy=float(np.mean(plain)),
        interval=ratio_interval(np.array(plain), np.ones(number), np.arange(number)),
        items=number,
        chance=float(np.mean([1 / len(question.choices) for question in questions])),
        right=list(plain),
        normalized_accuracy=float(np.mean(normalized)),
        by_wording={
            name: float(np.mean([one[0] for one in each if one]))
            for name, each in right.items()
            if any(each)
        },
    )


def _is_right(question: Question, logs) -> tuple[bool, bool]:
    """Whether the right choice wins, by its log-likelihood and by that over its bytes."""
    found = np.array([next(logs) for _ in question.choices])
    sizes = np.array([len(choice.encode()) for choice in question.choices])
    return bool(found.argmax() == question.answer), bool(
        (found / sizes).argmax() == question.answer
    )


def tokens(scorer: Scorer, tokenizer: Tokenizer, question: Question) -> list[Pair]:
    """(input, choice) of each choice. The input gives way at its left end where a row has no room.

    A model of text reads on: a choice is tokenized behind its input. A finetuned one was trained on
    targets that stand by themselves.
    """
    asked = tokenizer.encode(question.input)
    pairs = []
    for choice in question.choices:
        if scorer.objective == "supervised":
            answer = tokenizer.encode(choice)
        else:
            answer = _behind(tokenizer, question.input, asked, choice)
        room = max(scorer.settings.model.sequence_length - len(answer) - FORM, 1)
        pairs.append((asked[-room:].astype(np.int64), answer.astype(np.int64)))
    return pairs


def _behind(tokenizer: Tokenizer, text: str, asked: np.ndarray, choice: str) -> np.ndarray:
    both = tokenizer.encode(f"{text} {choice}")
    if len(both) > len(asked) and np.array_equal(both[: len(asked)], asked):
        return both[len(asked) :]
    return tokenizer.encode(f" {choice}")


def problems(tasks: Sequence[Task]) -> list[str]:
    """Names the wordings that ask for free text, which rank classification cannot score."""
    found = []
    for task in tasks:
        for wording in task.wordings:
            first = next(filter(None, map(wording.question, task.test)), None)
            if first is not None and not first.choices:
                found.append(f"{wording}: it has no choices to rank: give some")
    return found
