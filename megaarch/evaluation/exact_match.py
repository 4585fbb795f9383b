"""Exact match: whether the greedy answer to a question is its target, for wordings without choices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megaarch.config.schema import Evaluation
from megaarch.engine.base import Engine
from megaarch.errors import UserError
from megaarch.evaluation.scorer import Scorer, fitted
from megaarch.inference.generate import Generator, Options
from megaarch.ingest.tasks.template import Question
from megaarch.ingest.tokenizer import Tokenizer

END = "\n"  # of the answer of a model of text, which reads on


def right(
    scorer: Scorer, tokenizer: Tokenizer, questions: Sequence[Question], evaluation: Evaluation
) -> list[tuple[bool, bool]]:
    """Returns whether each answer is the target, spaces around both left out, and whether its question was
    shortened. The greedy answer ends where the model ends it, at a line's end, or past the longest target.

    UserError under a layout that cannot generate.
    """
    if not questions:
        return []
    longest = max(len(tokenizer.encode(question.target)) for question in questions)
    room = scorer.room(longest + 1)
    prompts, cut = zip(*(fitted(tokenizer, q, room) for q in questions), strict=True)
    options = Options(longest + 1, stops=(END,), batch_size=evaluation.batch_rows)
    with generator_of(scorer, tokenizer) as generator:
        answers = list(generator.answers(prompts, options))
    return [
        (answer.text.strip() == question.target, is_cut)
        for answer, question, is_cut in zip(answers, questions, cut, strict=True)
    ]


@contextmanager
def generator_of(scorer: Scorer, tokenizer: Tokenizer) -> Iterator[Generator]:
    """Yields a scorer's model as one that generates; after it, the model trains on as before. UserError under a
    layout that cannot generate."""
    model, grid = scorer.model, None
    if isinstance(model, Engine):
        model, grid = model.model, model.grid
        if grid.size("pp") > 1 or grid.size("cp") > 1:
            raise UserError(
                "study.evaluation.tasks: pipeline and context parallelism do not generate, as wordings "
                "without choices need: give these choices, or evaluate the run in one process"
            )
    training = model.training
    try:
        yield Generator(model, scorer.settings, tokenizer, grid)
    finally:
        model.train(training)
