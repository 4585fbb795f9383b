"""Validation of a run that trains by itself (`training.eval_every`): bits per byte of what it learns to predict."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from megaarch.checkpoint.record import Progress
from megaarch.config import catalogue
from megaarch.config.schema import Evaluation, Model, Settings
from megaarch.engine.base import Engine
from megaarch.errors import UserError
from megaarch.evaluation import yardsticks
from megaarch.evaluation.items import Item, cut
from megaarch.evaluation.rank_classification import target_bits
from megaarch.evaluation.scorer import Scorer, fits
from megaarch.ingest.prepared_data import Prepared
from megaarch.ingest.tokenizer import Tokenizer

Held = TypeVar("Held")
READ = 8  # held-out documents for each one that is scored: a short one gives no item


def usual_items(model: Model) -> Evaluation:
    """Returns the default items, shortened where the model's rows are too short for them: a span may be
    twice as long as continuation_tokens."""
    usual, row = Evaluation(), model.sequence_length
    span = min(row // 8, (model.target_length or row) // 3)
    return usual.model_copy(
        update={
            "prefix_tokens": min(usual.prefix_tokens, max(row // 2, 1)),
            "continuation_tokens": min(usual.continuation_tokens, max(span, 1)),
        }
    )


def spread(items: Sequence[Held], count: int) -> list[Held]:
    """Returns at most `count` of the items, evenly from all of them."""
    taken = min(count, len(items))
    return [items[i * len(items) // taken] for i in range(taken)]


def validate(settings: Settings, prepared: Prepared) -> Callable[[Engine, Progress], float | None]:
    """Returns what scores the model: the continuations of `training.eval_documents` held-out documents, from
    all over them, or as many targets of held-out pairs. Little more of the held-out text is read.

    UserError where there is none, or too short.
    """
    count, tokenizer = settings.training.eval_documents, prepared.tokenizer
    held = prepared.some_heldout(READ * count)
    if not held.documents:
        raise UserError("training.eval_every: this data has no held-out text to score; set it to 0")
    rows = settings.training.micro_batch_size

    def scorer(engine: Engine) -> Scorer:
        return Scorer(engine, settings, tokenizer.vocabulary, rows)

    if catalogue.OBJECTIVES[settings.data.objective].of_pairs and held.pairs:
        pairs = spread(held.pairs, count)
        return lambda engine, _: target_bits(scorer(engine), tokenizer, pairs)
    items = spread(_first_items(settings, held.documents, tokenizer), count)
    return lambda engine, _: yardsticks.continuation_bits(scorer(engine), items)


def _first_items(settings: Settings, documents: list[str], tokenizer: Tokenizer) -> list[Item]:
    """Returns the first item of each document, in their order: the usual ones, halved while the rows of training
    have no room for them (a decoder that restores its whole input). UserError where no document has one."""
    usual = usual_items(settings.model)
    while True:
        size = usual.prefix_tokens + usual.continuation_tokens
        try:
            firsts = {item.document: item for item in reversed(cut(documents, tokenizer, usual))}
        except UserError:
            raise UserError(
                f"training.eval_every: none of {len(documents)} held-out documents has an item of "
                f"{size} tokens between word starts; set it to 0, or give longer documents"
            ) from None
        items = [firsts[number] for number in sorted(firsts)]
        longest = (
            max(items, key=lambda item: len(item.left) + len(item.span)),
            max(items, key=lambda item: len(item.span)),
        )
        if size == 2 or all(fits(settings, tokenizer.vocabulary, i.left, i.span) for i in longest):
            return items
        halves = {
            n: max(getattr(usual, n) // 2, 1) for n in ("prefix_tokens", "continuation_tokens")
        }
        usual = usual.model_copy(update=halves)
