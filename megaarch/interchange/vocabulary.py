"""Room for megaarch's specials in the vocabulary of a model that was trained elsewhere."""

import torch

from megaarch.checkpoint.lazy import Lazy, Weights, changed
from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.model.transformer import padded_vocabulary

TABLES = ("embedding.weight", "output.weight", "output_bias")
# What other tokenizers call them; the first that the file has counts.
NAMES = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<s>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "[SEP]", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
}
SENTINEL = "<extra_id_{}>"  # T5's


def fitted(
    weights: Weights,
    model: schema.Model,
    path: str,
    sentinels: int,
    ids: dict[str, int | None],
    behind: int = 0,
) -> tuple[Lazy, schema.Model, Tokenizer, int]:
    """Weights and settings whose vocabulary is that of `Tokenizer(path, sentinels)`; and how many sentinels
    start from rows of their own.

    ids: special -> id in the old vocabulary, as the model's config has it. A special or sentinel
    that the old vocabulary has too, there or by its name in the file, starts from its rows; any
    other from the mean of all pieces (Hewitt 2021, "Initializing new word embeddings"). behind: sentinels that
    the old vocabulary has behind the pieces without names in the file, the last one first.
    UserError where the file has more pieces than the model has rows.
    """
    pieces = Tokenizer(path, sentinels=0).base_size
    old = model.vocabulary_size
    if pieces > old:
        raise UserError(
            f"tokenizer {path} has {pieces} pieces and the model a vocabulary of {old}: it is "
            "another model's"
        )
    least = Tokenizer(path, sentinels).vocabulary.size
    tokenizer = Tokenizer(path, sentinels, max(old, least))
    size = tokenizer.vocabulary.size
    sources = _sources(tokenizer, old, ids)
    marks = {k: tokenizer.vocabulary.sentinel(k) for k in range(sentinels)}
    for k in range(min(behind, sentinels)):
        if sources[marks[k]] is None:
            sources[marks[k]] = _first([pieces + behind - 1 - k], old)
    kept = sum(sources[mark] is not None for mark in marks.values())

    def grown(name: str, table: torch.Tensor) -> torch.Tensor:
        if name not in TABLES:
            return table
        mean = table[:pieces].mean(0, dtype=torch.float32).to(table.dtype)
        rows = table.new_zeros(padded_vocabulary(size), *table.shape[1:])
        rows[:old] = table[:old]
        rows[old:size] = mean
        for row, source in sources.items():
            rows[row] = mean if source is None else table[source]
        return rows

    model = model.model_copy(update={"vocabulary_size": size})
    return changed(weights, grown), model, tokenizer, kept


def _sources(tokenizer: Tokenizer, old: int, ids: dict[str, int | None]) -> dict[int, int | None]:
    """Maps every special token and sentinel to the old row that it starts from, or None."""
    words = tokenizer.vocabulary
    found: dict[int, int | None] = {}
    for name, row in words.special.items():
        named = [tokenizer.piece_id(piece) for piece in NAMES.get(name, ())]
        found[row] = _first([ids.get(name), *named], old)
    for k in range(words.sentinels):
        found[words.sentinel(k)] = _first([tokenizer.piece_id(SENTINEL.format(k))], old)
    return found


def _first(ids: list[int | None], old: int) -> int | None:
    return next((i for i in ids if isinstance(i, int) and 0 <= i < old), None)
