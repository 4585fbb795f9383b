"""Validation of a run that trains by itself (`training.eval_every`): bits per byte of what it learns to predict."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from megaarch.checkpoint.record import Progress
from megaarch.config import catalogue
from megaarch.config.schema import Evaluation, Model, Settings
from megaarch.engine.base import Engine
from megaarch.errors import UserError
from megaarch.evaluation import yardsticks
from megaarch.evaluation.items import cut
from megaarch.evaluation.rank_classification import target_bits
from megaarch.evaluation.scorer import Scorer
from megaarch.ingest.prepared_data import Prepared

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
    usual = usual_items(settings.model)
    try:
        firsts = {item.document: item for item in reversed(cut(held.documents, tokenizer, usual))}
    except UserError:
        raise UserError(
            f"training.eval_every: none of {len(held.documents)} held-out documents has an item of "
            f"{usual.prefix_tokens + usual.continuation_tokens} tokens between word starts; set it to 0, or give "
            "longer documents"
        ) from None
    items = spread([firsts[number] for number in sorted(firsts)], count)
    return lambda engine, _: yardsticks.continuation_bits(scorer(engine), items)
