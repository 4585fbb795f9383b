"""The tasks of a study: its own, by files, and lm-evaluation-harness's, by names."""

import hashlib
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megaarch.config import catalogue
from megaarch.config.schema import Data, Evaluation, Settings
from megaarch.errors import UserError
from megaarch.evaluation import rank_classification
from megaarch.evaluation.exact_match import generator_of
from megaarch.evaluation.heldout_scores import TaskScore
from megaarch.evaluation.scorer import Scorer
from megaarch.files import read_bytes
from megaarch.ingest import sources
from megaarch.ingest.tasks.task import Task, find
from megaarch.ingest.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megaarch.lm_eval.evaluate import Tasks


def by_place(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns what is on disk, or looks like a path, and the names of lm-evaluation-harness's tasks."""
    paths = [task for task in tasks if "/" in task or task.endswith(".yaml") or Path(task).exists()]
    return paths, [task for task in tasks if task not in paths]


@lru_cache(maxsize=8)
def _harness(names: tuple[str, ...], include_path: str | None) -> "Tasks":
    from megaarch.lm_eval.evaluate import Tasks

    return Tasks(names, include_path)


def harness_of(evaluation: Evaluation) -> "Tasks | None":
    """Returns the harness's tasks of a study; None where it names none. UserError for an unknown name."""
    _, names = by_place(evaluation.tasks)
    return _harness(tuple(names), evaluation.include_path) if names else None


def _own(evaluation: Evaluation) -> list[Task]:
    """Returns a study's own tasks. UserError for a file that is none."""
    paths, _ = by_place(evaluation.tasks)
    return [task for path in paths for task in find(path)]


def identity(evaluation: Evaluation) -> dict[str, str]:
    """Maps each task's name to a digest of all that its items come from."""
    harness, found = harness_of(evaluation), {}
    for task in _own(evaluation):
        content = b"\0".join(read_bytes(path) for path in task.inputs)
        found[task.name] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found | (harness.identity(evaluation.task_items) if harness else {})


def check(evaluation: Evaluation, settings: Settings) -> None:
    """UserError where a cell cannot be scored by a task: one of the harness under its layout, or one that asks for
    generated text."""
    harness, parallel = harness_of(evaluation), settings.parallel
    divided = parallel.pipeline_parallel > 1 or parallel.context_parallel > 1
    if harness is not None and divided:
        raise UserError(
            "study.evaluation.tasks: the tasks of lm-evaluation-harness run under tensor and sharded data "
            "parallelism alone: leave out parallel.pipeline_parallel and parallel.context_parallel, or score the "
            "finished runs with megaarch evaluate"
        )
    generating = [
        f"{task.name} (wordings without choices)"
        for task in _own(evaluation)
        if any(wording.choices is None for wording in task.wordings)
    ]
    if generating and divided:
        raise UserError(
            f"study.evaluation.tasks: {', '.join(generating)} asks for generated text, and pipeline and context "
            "parallelism do not generate: give choices, or evaluate the run in one process"
        )
    generating += harness.generating if harness else []
    if generating and not catalogue.OBJECTIVES[settings.data.objective].comparable:
        raise UserError(
            f"study.evaluation.tasks: {', '.join(generating)} asks for generated text, and a model of "
            f"{settings.data.objective} generates none: leave out the task or the cell"
        )


def check_items(evaluation: Evaluation) -> None:
    """UserError where an item of a study's own tasks cannot be asked as it is to be."""
    for task in _own(evaluation):
        for wording in task.wordings:
            for shots in evaluation.numbers_of_shots:
                task.questions(wording, evaluation.task_items, shots)


def answers(evaluation: Evaluation) -> set[str]:
    """Returns all texts among which the answers of a study's own tasks are chosen, or that are to be generated."""
    return {
        answer
        for task in _own(evaluation)
        for wording in task.wordings
        for question in task.questions(wording, evaluation.task_items, 0)
        if question
        for answer in (question.choices if wording.choices is not None else (question.target,))
    }


def trained_on(data: Data) -> set[str]:
    """Returns the names of the tasks among the sources of pairs that a run trains on."""
    if data.objective != "supervised":
        return set()
    paths = [data.source] if isinstance(data.source, str) else [s.path for s in data.source]
    files = [file for path in paths for file in sources.files(path)]
    return {Task(file).name for file in files if sources.format_of(file) == "task"}


def score(
    scorer: Scorer, tokenizer: Tokenizer, evaluation: Evaluation, trained: Collection[str] = ()
) -> dict[str, TaskScore]:
    """Returns the score of each task by its name, behind the first number of examples; by each number where
    there are several. trained: names of the tasks that the model was trained on."""
    own, harness = _own(evaluation), harness_of(evaluation)
    by_shots: dict[str, dict[str, TaskScore]] = {}
    for number in evaluation.numbers_of_shots:
        by_shots[str(number)] = scores = {
            task.name: rank_classification.score(scorer, tokenizer, task, evaluation, number)
            for task in own
        }
        if harness is not None:
            scores |= _of_harness(harness, scorer, tokenizer, evaluation, number)
    first = next(iter(by_shots.values()))
    found = {name: score.model_copy() for name, score in first.items()}
    for name, score in found.items():
        if len(by_shots) > 1:
            score.by_shots = {number: scores[name] for number, scores in by_shots.items()}
        score.trained_on = name in trained
    return found


def _of_harness(
    harness: "Tasks", scorer: Scorer, tokenizer: Tokenizer, evaluation: Evaluation, shots: int
) -> dict[str, TaskScore]:
    with generator_of(scorer, tokenizer) as generator:
        found = harness.score(
            generator, shots, evaluation.task_items, evaluation.batch_rows, scorer.room.text
        )
    return {name: rank_classification.task_score(*items) for name, items in found.items()}
