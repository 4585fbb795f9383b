"""Held-out items: the same prefixes, continuations and middles for every cell of a study.

Items are cut from held-out documents at word starts, so that no character is split and bytes are
counted on the original text. Which windows are taken depends on the documents alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megaarch.config.schema import Evaluation
from megaarch.errors import UserError

CHECKED = 1000  # held-out documents that must survive the tokenizer
FEWEST_WORDS = 0.05  # of all tokens; of English some 60%
LONGEST_CHARACTER = 4  # tokens: bytes of UTF-8


@dataclass(frozen=True)
class Item:
    """A window of a held-out document.

    document: its number, which a bootstrap resamples. left, span, right: int token arrays. The
    continuation task predicts `span` from `left`; the middle task from `left` and `right`.
    span_bytes: UTF-8 bytes of the span's text. length_bytes: those of the first tokens behind `left`,
    by their number; without numbers that the window does not hold, that end within a character or
    that hold an unknown token.
    """

    document: int
    left: np.ndarray
    span: np.ndarray
    right: np.ndarray
    span_bytes: int
    length_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def following(self) -> np.ndarray:
        """The tokens behind `left`: the span and what follows it."""
        return np.concatenate([self.span, self.right])


def cut(documents: list[str], tokenizer, evaluation: Evaluation) -> list[Item]:
    """Items of all documents in rounds: first one of each document, then a second, ...

    UserError where no document is long enough for one item.
    """
    by_document = [_windows(d, text, tokenizer, evaluation) for d, text in enumerate(documents)]
    most = max((len(items) for items in by_document), default=0)
    rounds = [items[r] for r in range(most) for items in by_document if r < len(items)]
    if not rounds:
        need = evaluation.prefix_tokens + evaluation.continuation_tokens
        if max((len(tokenizer.encode(text)) for text in documents), default=0) < 2 * need:
            raise UserError(
                f"no held-out document has {need} tokens for one item: give more text, or lower "
                "study.evaluation.prefix_tokens and continuation_tokens"
            )
        raise UserError(
            f"{word_share(documents, tokenizer):.1%} of the tokens of held-out text begin a word, too few "
            f"to cut items of {need} tokens at: give text with more words, use another tokenizer, or "
            "raise study.evaluation.prefix_tokens and continuation_tokens"
        )
    return rounds


def _windows(d: int, text: str, tokenizer, evaluation: Evaluation) -> list[Item]:
    tokens = tokenizer.encode(text).astype(np.int64)
    text_ids = tokenizer.vocabulary.text
    starts = np.flatnonzero(tokenizer.vocabulary.word_start[tokens])
    prefix, length = evaluation.prefix_tokens, evaluation.continuation_tokens
    items, begin = [], 0
    while True:
        cuts = [begin]
        for step in (prefix, length):
            following = starts[starts >= cuts[-1] + step]
            if len(following) == 0:
                return items
            cuts.append(int(following[0]))
        _a, b, c = cuts
        # behind a run without a word start (a URL, a table) windows begin anew
        if b > begin + 2 * prefix:
            begin = b
            continue
        if c > b + 2 * length:
            begin = c
            continue
        right = tokens[c : c + prefix // 2]
        # a window may run over its nominal length by a word: the left side gives way
        left = tokens[b - prefix : b]
        span = tokens[b:c][: 2 * length]
        begin = c + prefix // 2
        if text_ids[span].all():  # an unknown token has no probability among text tokens
            # the span's bytes behind its left side: a decoder may strip a leading space
            size = len(tokenizer.decode(tokens[b - prefix : b + len(span)]).encode()) - len(
                tokenizer.decode(left).encode()
            )
            sizes = _length_bytes(tokens, b - prefix, b, begin, tokenizer, evaluation.lengths)
            items.append(Item(d, left, span, right, size, sizes))


def _length_bytes(
    tokens: np.ndarray, start: int, b: int, end: int, tokenizer, lengths: Sequence[int]
) -> dict[int, int]:
    """Returns Item.length_bytes of the tokens from `b` to `end`, behind those from `start`."""
    text = tokenizer.vocabulary.text[tokens[b:end]]
    known = len(text) if text.all() else int(text.argmin())
    whole = tokenizer.decode(tokens[start : end + LONGEST_CHARACTER])
    left = len(tokenizer.decode(tokens[start:b]).encode())
    sizes = {}
    for length in (length for length in lengths if length <= known):
        decoded = tokenizer.decode(tokens[start : b + length])
        if whole.startswith(decoded):  # half a character is decoded as another one
            sizes[length] = len(decoded.encode()) - left
    return sizes


def word_share(documents: list[str], tokenizer) -> float:
    """Returns the share of tokens that begin a word, of the first CHECKED documents; 1 without tokens."""
    starts = tokenizer.vocabulary.word_start
    begin = [starts[tokenizer.encode(text)] for text in documents[:CHECKED]]
    return float(np.concatenate(begin).mean()) if sum(map(len, begin)) else 1.0


def text_warnings(documents: list[str], tokenizer) -> list[str]:
    """Returns the sentences to warn with of held-out text that this tokenizer does not suit."""
    share = word_share(documents, tokenizer)
    few = (
        f"Of the tokens of held-out text {share:.1%} begin a word: items are cut there alone, and denoising, "
        "permutation_lm and data.whole_word_masking, which take whole words, make little of such text."
    )
    found = (unfaithful(documents, tokenizer), few if share < FEWEST_WORDS else None)
    return [sentence for sentence in found if sentence]


def unfaithful(documents: list[str], tokenizer) -> str | None:
    """None where the tokenizer gives held-out text back as it was, else the sentence to warn with.

    What it drops (case, accents, runs of spaces, newlines) need not be predicted, so that bits per
    byte come out too low for the text, and spans are counted in the bytes of what is left.
    """
    documents = documents[:CHECKED]
    for text in documents:
        back = tokenizer.decode(tokenizer.encode(text))
        if back == text:
            continue
        same = min(len(text), len(back))
        at = next((i for i in range(same) if text[i] != back[i]), same)
        first = max(0, at - 10)
        return (
            f"The tokenizer ({tokenizer.description}) does not give held-out text back as it was: "
            f"{text[first : at + 10]!r} came back as {back[first : at + 10]!r}. Bits per byte are "
            "those of the altered text: compare them within this study only."
        )
    return None


def split(documents: list[str], tokenizer, evaluation: Evaluation) -> dict[str, list[Item]]:
    """Items by use. Every third document serves `validation` (the curve, tuning), the others
    `test`: what chose a learning rate does not judge the model.

    UserError where the text gives no item for one of them.
    """
    items = cut(documents, tokenizer, evaluation)
    parts = {
        "validation": [item for item in items if item.document % 3 == 0],
        "test": [item for item in items if item.document % 3 != 0],
    }
    for name, found in parts.items():
        if not found:
            raise UserError(
                f"the held-out text has no item for {name}: give more text, raise data.held_out, "
                "or lower study.evaluation.prefix_tokens"
            )
    return parts
