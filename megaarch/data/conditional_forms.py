"""How held-out text is scored: a continuation given a prefix, a middle given both of its sides.

Each objective scores in the form that it was trained on, which stands in its own file
(data/objectives/). The targets of weight 1, over all examples returned, are the scored tokens in
order, and no target sees itself or what comes after it, with one exception: BERT has no
left-to-right conditional, so it sees the rest of the continuation, and its figure compares with no
other. Of a middle it sees only what is before.

    objective          inputs                targets, (weight 0)      of the continuation
    full_lm, prefix_lm p                     c
    supervised         p eos                 c
    span_corruption    p' <k> eos            (<0> .. <k>) c           p' is p with k spans of the run's noise,
                                                                      which are given; of an encoder-decoder in
                                                                      pieces of c that its decoder holds
    ul2                mode_s p eos          c
    denoising          p [MASK]              (p) c                    forced through the prefix
    blank_infilling    p [gMASK]             c, fed sop c
    permutation_lm     p c                   c, query stream left to right
    unilm              p c[:j] [MASK]        c[j], one example a token, left to right
    masked_lm          p c with c[j] masked  c[j], one example a token: a pseudo-likelihood
"""

from collections.abc import Sequence

import numpy as np

from megaarch.config.catalogue import OBJECTIVES, objectives_of
from megaarch.config.registry import load
from megaarch.data.example import Example, Tokens, Vocabulary
from megaarch.data.objectives.span_corruption import Spans
from megaarch.errors import UserError

ADDED = 8  # tokens that a form adds at most, whatever the prefix (specials, a mode, sentinels)


def continuation(
    objective: str,
    architecture: str,
    prefix: Tokens,
    continuation: Tokens,
    vocabulary: Vocabulary,
    spans: Spans | None = None,
) -> list[Example]:
    """Returns examples that score `continuation` [c] after `prefix` [p], in the objective's own
    form. spans: those that a run's form gives (row_lengths.spans_of); None: the default ones.

    UserError for a pair that cannot be trained, and where there is nothing to score.
    """
    prefix, scored, nothing = check(objective, architecture, prefix, continuation, prefix[:0])
    row = OBJECTIVES[objective]
    if row.continuation is None:
        return _middle(objective, (prefix, scored, nothing), vocabulary, spans)
    return load(row.continuation)(prefix, scored, vocabulary)


def middle(
    objective: str,
    architecture: str,
    before: Tokens,
    middle: Tokens,
    after: Tokens,
    vocabulary: Vocabulary,
    spans: Spans | None = None,
) -> list[Example]:
    """Examples that score `middle` [m] between `before` [b] and `after` [a]. spans: as `continuation`'s.

    UserError where the objective cannot state it, and where there is nothing to score.
    """
    if OBJECTIVES[objective].middle is None:
        able = ", ".join(row.name for row in OBJECTIVES.values() if row.middle is not None)
        raise UserError(
            f"{objective} cannot state a middle given both of its sides: "
            f"objectives that can are {able}"
        )
    sides = check(objective, architecture, before, middle, after)
    return _middle(objective, sides, vocabulary, spans)


def _middle(
    objective: str, sides: Sequence[Tokens], vocabulary: Vocabulary, spans: Spans | None
) -> list[Example]:
    row = OBJECTIVES[objective]
    given = (spans or Spans(),) if row.gives_spans else ()
    return load(row.middle)(*sides, vocabulary, *given)


def check(
    objective: str, architecture: str, before: Tokens, scored: Tokens, after: Tokens
) -> list[Tokens]:
    """All as int64. UserError unless the pair can be trained and there is a token to score."""
    accepted = objectives_of(architecture)
    if objective not in accepted:
        raise UserError(
            f"{architecture} cannot run the objective {objective}: "
            f"it takes {', '.join(accepted) or 'none, for it is not known'}"
        )
    if len(scored) == 0:
        raise UserError("there is no token to score: give a continuation of at least one token")
    return [np.asarray(tokens, dtype=np.int64) for tokens in (before, scored, after)]
