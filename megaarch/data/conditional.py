"""How each objective states a conditional, so that held-out text can be scored.

    continuation    score c, given the prefix p
    middle          score m, given before b and after a

    objective          inputs                targets, (weight 0)      of the continuation
    full_lm, prefix_lm p                     c
    supervised         p eos                 c
    span_corruption    p <0> eos             (<0>) c
    ul2                mode_s p eos          c
    denoising          p [MASK]              (p) c                    forced through the prefix
    blank_infilling    p [gMASK]             c, fed sop c
    permutation_lm     p c                   c, query stream left to right
    unilm              p c[:j] [MASK]        c[j], one example a token, left to right
    masked_lm          p c with c[j] masked  c[j], one example a token: a pseudo-likelihood

Each is the form that the objective trained. The targets of weight 1, over all examples returned,
are the scored tokens in order, and no target sees itself or what comes after it, with one
exception: BERT has no left-to-right conditional, so it sees the rest of the continuation, and its
figure compares with no other (Salazar et al. 2020). Of a middle it sees only what is before.
"""

from collections.abc import Callable

import numpy as np

from megaarch.config.catalogue import ARCHITECTURES
from megaarch.data.example import Example, Vocabulary
from megaarch.data.objectives.blank_infilling import text_positions
from megaarch.errors import UserError

MIDDLES = (
    "span_corruption",
    "ul2",
    "denoising",
    "blank_infilling",
    "permutation_lm",
    "unilm",
    "masked_lm",
)


def continuation(
    objective: str,
    architecture: str,
    prefix: np.ndarray,
    continuation: np.ndarray,
    vocabulary: Vocabulary,
) -> list[Example]:
    """Examples that score `continuation` [c] after `prefix` [p], in the objective's own form.

    ValueError for a pair that cannot be trained, and where there is nothing to score.
    """
    prefix, scored = check(objective, architecture, prefix, continuation)
    if objective in ("full_lm", "prefix_lm"):
        return [Example(prefix, scored)]
    if objective == "supervised":
        return [Example(join(prefix, vocabulary.eos), scored)]
    if objective == "ul2":
        return [Example(join(vocabulary.mode_s, prefix, vocabulary.eos), scored)]
    if objective == "masked_lm":
        return one_masked_at_a_time(prefix, scored, vocabulary)
    if objective == "unilm":
        return left_to_right(prefix, scored, vocabulary)
    empty = prefix[:0]
    if objective == "blank_infilling":
        return [blank(prefix, scored, empty, vocabulary.suffix_mask, vocabulary)]
    return SPANS[objective](prefix, scored, empty, vocabulary)


def middle(
    objective: str,
    architecture: str,
    before: np.ndarray,
    middle: np.ndarray,
    after: np.ndarray,
    vocabulary: Vocabulary,
) -> list[Example]:
    """Examples that score `middle` [m] between `before` [b] and `after` [a].

    ValueError where the objective cannot state it, and where there is nothing to score.
    """
    if objective not in MIDDLES:
        raise UserError(
            f"{objective} cannot state a middle given both of its sides: "
            f"objectives that can are {', '.join(MIDDLES)}"
        )
    before, scored, after = check(objective, architecture, before, middle, after)
    if objective in ("unilm", "masked_lm"):
        return masked_remainder(before, scored, after, vocabulary)
    if objective == "ul2":
        return sentinel(join(vocabulary.mode_r, before), scored, after, vocabulary)
    if objective == "blank_infilling":
        return [blank(before, scored, after, vocabulary.mask, vocabulary)]
    return SPANS[objective](before, scored, after, vocabulary)


def check(
    objective: str, architecture: str, before: np.ndarray, scored: np.ndarray, *after: np.ndarray
) -> list[np.ndarray]:
    """All as int64. ValueError unless the pair can be trained and there is a token to score."""
    accepted = ARCHITECTURES[architecture].objectives if architecture in ARCHITECTURES else ()
    if objective not in accepted:
        raise UserError(
            f"{architecture} cannot run the objective {objective}: "
            f"it takes {', '.join(accepted) or 'none, for it is not known'}"
        )
    if len(scored) == 0:
        raise UserError("there is no token to score: give a continuation of at least one token")
    return [np.asarray(tokens, dtype=np.int64) for tokens in (before, scored, *after)]


def join(*pieces: int | np.ndarray) -> np.ndarray:
    """One int64 array of tokens and arrays of tokens."""
    return np.concatenate([np.atleast_1d(np.asarray(piece, dtype=np.int64)) for piece in pieces])


def forced(inputs: np.ndarray, given: int | np.ndarray, scored: np.ndarray) -> Example:
    """Targets `given` (weight 0) and then `scored` (weight 1)."""
    targets = join(given, scored)
    return Example(inputs, targets, weights=np.arange(len(targets)) >= len(targets) - len(scored))


def sentinel(
    before: np.ndarray, scored: np.ndarray, after: np.ndarray, vocabulary: Vocabulary
) -> list[Example]:
    """T5: the span stands behind sentinel 0."""
    mark = vocabulary.sentinel(0)
    return [forced(join(before, mark, after, vocabulary.eos), mark, scored)]


def whole(
    before: np.ndarray, scored: np.ndarray, after: np.ndarray, vocabulary: Vocabulary
) -> list[Example]:
    """BART: the whole text is generated; what stands before is forced."""
    return [forced(join(before, vocabulary.mask, after), before, scored)]


def blank(
    before: np.ndarray, scored: np.ndarray, after: np.ndarray, mask: int, vocabulary: Vocabulary
) -> Example:
    """GLM: one span, generated at its mask's position."""
    inputs = join(before, mask, after)
    m = len(scored)
    return Example(
        inputs,
        scored,
        feed=join(vocabulary.sop, scored[:-1]),
        input_positions=text_positions(len(inputs)),
        feed_positions=np.stack([np.full(m, len(before)), np.arange(1, m + 1)], axis=1),
    )


def permuted(
    before: np.ndarray, scored: np.ndarray, after: np.ndarray, vocabulary: Vocabulary
) -> list[Example]:
    """XLNet: both sides are context; the scored tokens come in order."""
    places = len(before) + np.arange(len(scored))
    return [Example(join(before, scored, after), scored, places=places, permuted=True)]


SPANS: dict[str, Callable[..., list[Example]]] = {
    "span_corruption": sentinel,
    "denoising": whole,
    "permutation_lm": permuted,
}


def left_to_right(prefix: np.ndarray, scored: np.ndarray, vocabulary: Vocabulary) -> list[Example]:
    """UniLM's seq2seq form: the next token is a [MASK] at the end of what is known."""
    return [
        cloze(join(prefix, scored[:j], vocabulary.mask), len(prefix) + j, scored[j], len(prefix))
        for j in range(len(scored))
    ]


def masked_remainder(
    before: np.ndarray, scored: np.ndarray, after: np.ndarray, vocabulary: Vocabulary
) -> list[Example]:
    """UniLM's and BERT's middle: all see all, and what is not yet known is [MASK]."""
    masks = np.full(len(scored), vocabulary.mask)
    return [
        cloze(join(before, scored[:j], masks[j:], after), len(before) + j, scored[j])
        for j in range(len(scored))
    ]


def one_masked_at_a_time(
    prefix: np.ndarray, scored: np.ndarray, vocabulary: Vocabulary
) -> list[Example]:
    """BERT's pseudo-likelihood: everything but the one token is seen."""
    text = join(prefix, scored)
    places = range(len(prefix), len(text))
    return [
        cloze(join(text[:place], vocabulary.mask, text[place + 1 :]), place, text[place])
        for place in places
    ]


def cloze(inputs: np.ndarray, place: int, target: int, prefix: int | None = None) -> Example:
    """One target at one place."""
    return Example(inputs, join(target), places=np.array([place]), prefix=prefix)
