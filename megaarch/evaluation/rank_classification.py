"""Scores of tasks by rank classification (Brown et al. 2020; Sanh et al. 2022): the answer is the choice
that the model gives the largest probability after the question, in its own conditional form.

Probabilities are over text tokens, as those of every yardstick: a sentinel that a model of span corruption expects
behind a few tokens would make its long choices unlikely. A finetuned model ends its targets, so that a choice has its
eos, and probabilities are over all tokens (Sanh et al. 2022): else a choice that begins with another never wins.

An item counts by the share of its wordings in which the right choice wins, so that an interval over
items is one over what was asked and not over how.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from megaarch.config import catalogue
from megaarch.config.schema import Evaluation
from megaarch.data.dataset import pair_lengths
from megaarch.evaluation import exact_match
from megaarch.evaluation.confidence_intervals import share_interval
from megaarch.evaluation.heldout_scores import TaskScore
from megaarch.evaluation.scorer import Pair, Scorer, fitted
from megaarch.ingest.tasks.task import Task
from megaarch.ingest.tasks.template import Question
from megaarch.ingest.tokenizer import Tokenizer

COUNTED = 1000  # items whose answers say which is commonest
Answers = list[tuple[bool, bool] | None]  # by likelihood, and by that over bytes; None: not asked


def score(
    scorer: Scorer, tokenizer: Tokenizer, task: Task, evaluation: Evaluation, shots: int
) -> TaskScore:
    """Returns the score of a task behind so many answered examples."""
    ranked, free = {}, {}
    for wording in task.wordings:
        of_kind = free if wording.choices is None else ranked
        of_kind[wording.name] = task.questions(wording, evaluation.task_items, shots)
    asked = [question for each in ranked.values() for question in each if question]
    encoded = [tokens(scorer, tokenizer, question) for question in asked]
    pairs = [pair for of_question, _ in encoded for pair in of_question]
    logs = iter(())
    if pairs:
        scores = scorer.loglikelihoods(pairs)
        logs = iter(scores.raw if _ends(scorer) else scores.text)
    right: dict[str, Answers] = {
        name: [question and _is_right(question, logs) for question in questions]
        for name, questions in ranked.items()
    }
    open_ended = [question for each in free.values() for question in each if question]
    found = exact_match.right(scorer, tokenizer, open_ended, evaluation)
    matches = iter(found)
    exact: dict[str, Answers] = {
        name: [question and (hit := next(matches)[0], hit) for question in questions]
        for name, questions in free.items()
    }
    matched = _by_item(exact, 0)
    plain = _by_item(right, 0) or matched
    if not plain:
        return TaskScore(accuracy=None)
    return task_score(
        plain,
        _by_item(right, 1),
        matched,
        chances=[1 / len(question.choices) for question in asked],
        prior=_prior(task, ranked),
        shortened=_mean([is_cut for _, is_cut in (*encoded, *found)]),
        by_wording={
            name: _mean([one[0] for one in each if one])
            for name, each in (right | exact).items()
            if any(each)
        },
    )


def task_score(
    right: list[float],
    normalized: list[float],
    matched: list[float],
    chances: list[float],
    **more: Any,
) -> TaskScore:
    """Returns the score of what each item has right, by likelihood (or as an exact match, where no item has choices),
    by that over bytes, and as an exact match. chances: of guessing each item that has choices."""
    return TaskScore(
        accuracy=_mean(right),
        interval=share_interval(right),
        items=len(right),
        chance=_mean(chances),
        right=right,
        normalized_accuracy=_mean(normalized),
        exact_match=_mean(matched),
        exact_match_interval=share_interval(matched),
        **more,
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _prior(task: Task, ranked: Mapping[str, Sequence[Question | None]]) -> float | None:
    """Returns how often the choice is right that is right most often among the items to train on; None without
    such items."""
    hits = []
    for wording in task.wordings:
        answers = Counter(q.target for q in map(wording.question, task.train[:COUNTED]) if q)
        for question in ranked.get(wording.name, ()):
            if question and answers:
                given = max(question.choices, key=lambda choice: answers[choice])
                hits.append(given == question.choices[question.answer or 0])
    return _mean(hits)


def _by_item(answers: dict[str, Answers], kind: int) -> list[float]:
    """Returns the share of wordings in which each item is right, of the items that some wording suits."""
    items = [[one[kind] for one in of_item if one] for of_item in zip_longest(*answers.values())]
    return [float(np.mean(of_item)) for of_item in items if of_item]


def _is_right(question: Question, logs) -> tuple[bool, bool]:
    """Whether the right choice wins, by its log-likelihood and by that over its bytes."""
    found = np.array([next(logs) for _ in question.choices])
    sizes = np.array([len(choice.encode()) for choice in question.choices])
    return bool(found.argmax() == question.answer), bool(
        (found / sizes).argmax() == question.answer
    )


def target_bits(
    scorer: Scorer, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> float | None:
    """Returns the bits per byte of the targets of (input, target) pairs, cut as training cuts them: to their
    first tokens, and the ends that follow; None without a target's byte."""
    settings, encoded, size = scorer.settings, [], 0
    for given, target in pairs:
        asked, answer = (tokenizer.encode(text).astype(np.int64) for text in (given, target))
        whole = np.array([[len(asked) + 1, len(answer) + 1]])  # with eos
        [[inputs, targets]], _ = pair_lengths(whole, settings.model, settings.data)
        if len(answer) >= targets:
            answer = answer[: targets - 1]
            target = tokenizer.decode(answer)
        if len(answer):
            encoded.append((asked[: inputs - 1], answer))
            size += len(target.encode())
    if not size:
        return None
    return float(-scorer.loglikelihoods(encoded).text.sum() / size / np.log(2))


def tokens(scorer: Scorer, tokenizer: Tokenizer, question: Question) -> tuple[list[Pair], bool]:
    """Returns (input, choice) of each choice, and whether the input was shortened: to what there is room
    for before the longest choice, the same for all of them.

    A model of text reads on: a choice is tokenized behind its input. A finetuned one was trained on
    targets that stand by themselves and end in eos.
    """
    if _ends(scorer):
        eos = tokenizer.vocabulary.eos
        answers = [np.append(tokenizer.encode(choice), eos) for choice in question.choices]
    else:
        whole = tokenizer.encode(question.input)
        answers = [_behind(tokenizer, question.input, whole, c) for c in question.choices]
    asked, is_cut = fitted(tokenizer, question, scorer.room(max(map(len, answers))))
    return [(asked, answer.astype(np.int64)) for answer in answers], is_cut


def _ends(scorer: Scorer) -> bool:
    return catalogue.OBJECTIVES[scorer.objective].of_pairs


def _behind(tokenizer: Tokenizer, text: str, asked: np.ndarray, choice: str) -> np.ndarray:
    both = tokenizer.encode(f"{text} {choice}")
    if len(both) > len(asked) and np.array_equal(both[: len(asked)], asked):
        return both[len(asked) :]
    return tokenizer.encode(f" {choice}")
