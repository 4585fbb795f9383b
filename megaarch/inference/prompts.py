"""The conditional forms of data/conditional_forms.py with an open end: what a model is given before it
generates, and how its row goes on.

Nothing is stated twice: a prompt is the form in which two unknown tokens would be scored after it, cut
behind the row at which the first of them is read off. ^ is the start token, ? the query token; the last
column is what stays in the row when a token X has been generated, and what is read next.

    objective          encoder          decoder, read off at its last row       then
    full_lm, prefix_lm p                ^        (a decoder alone: ^ p)         .. X
    supervised         p eos            ^        (^ p eos)                      .. X
    span_corruption    p' <k> eos       ^ (<0> .. <k>)  (^ p' <k> eos <0> ..)   .. X     p' is p with k spans
    ul2                mode_s p eos     ^        (^ mode_s p eos)               .. X
    denoising          p [MASK]         ^ p      (^ p [MASK] p)                 .. X
    blank_infilling                     p [gMASK] sop                           .. X
    unilm                               p [MASK]                                p X [MASK]
    permutation_lm                      p ?                                     p X ?
"""

from dataclasses import dataclass, replace

import numpy as np

from megaarch.attention.mask import CAUSAL, full
from megaarch.config.catalogue import OBJECTIVES
from megaarch.data import conditional_forms
from megaarch.data.example import ConvertedStream, Tokens, TooManySpans, Vocabulary
from megaarch.data.feature_converters import Part, converter_of
from megaarch.data.objectives.span_corruption import Spans
from megaarch.errors import UserError


@dataclass(frozen=True)
class Form:
    """How a row goes on behind its prompt.

    advance: int [A], what positions gain from a token to the next.
    probe: the token behind each new one at which the next is read off, whose keys are not kept; None:
        that is the new token itself. sees_itself: whether a probe is among its own keys.
    ends: ids that end an answer. follows: whether an answer continues the prompt's text.
    """

    advance: tuple[int, ...]
    probe: int | None
    sees_itself: bool
    ends: tuple[int, ...]
    follows: bool

    @property
    def width(self) -> int:
        """Tokens of a step."""
        return 1 if self.probe is None else 2


@dataclass(frozen=True)
class Prompt:
    """A prompt in its model's own form. The next token is read off at the last row of `stream`.

    encoder: the whole stream of an encoder, which every token of `stream` sees; None where there is
    none. stream: that of the last stack.
    """

    form: Form
    stream: ConvertedStream
    encoder: ConvertedStream | None = None

    @property
    def next_position(self) -> np.ndarray:
        """int [A]: of the first new token, and of a probe before it."""
        last = self.stream.positions[-1]
        return last + self.form.advance if self.form.probe is None else last


def prompt(
    objective: str,
    architecture: str,
    prefix: Tokens,
    vocabulary: Vocabulary,
    spans: Spans | None = None,
) -> Prompt:
    """Returns `prefix` as the objective's form has it, with an open end. spans: those that a run's form
    gives, without a bound; None: the default ones.

    UserError for an empty prefix, and for an objective or a pair that cannot generate; TooManySpans for a
    prefix with more spans than there are sentinels.
    """
    row = OBJECTIVES[objective]
    if not row.comparable:
        raise UserError(
            f"a model of {objective} cannot generate: it has no left-to-right conditional; a model of "
            "any other objective can"
        )
    if len(prefix) == 0:
        raise UserError("the prompt is empty: give text to continue")
    unknown = np.full(2, vocabulary.pad)
    try:
        [example, *_] = conditional_forms.continuation(
            objective, architecture, prefix, unknown, vocabulary, spans
        )
    except TooManySpans:
        if not vocabulary.sentinels:
            raise TooManySpans(
                f"a model of {objective} is given a prompt with spans masked by sentinels, and this one "
                "knows none: train or convert it with some (data.sentinels, --sentinels)"
            ) from None
        raise TooManySpans(
            f"the prompt has {len(prefix)} tokens, which {objective} masks in more spans than the "
            f"{vocabulary.sentinels} sentinels that the model knows: shorten it"
        ) from None
    *before, stream = (converted := converter_of(architecture)(example, vocabulary)).streams
    advance = np.ones(stream.positions.shape[1], dtype=np.int64)
    probe = None
    if example.places is None:
        first, second = converted.target_index[-2:]
        advance = stream.positions[second] - stream.positions[first]
        stream = window(stream, 0, first + 1)
    else:
        probe = int(stream.tokens[converted.target_index[0]])
        if example.permuted:
            stream = _one_query(stream, len(example.inputs) - 2)
    form = Form(
        advance=tuple(advance.tolist()),
        probe=probe,
        sees_itself=not example.permuted,
        ends=ends(row.ends, vocabulary),
        follows=not row.of_pairs,
    )
    return Prompt(form, stream, *before)


def _one_query(stream: ConvertedStream, context: int) -> ConvertedStream:
    """Returns a two-stream row's context and the first of its queries."""
    query = context + 2
    keep = [*range(context), query]
    parts = [full(0, context + 1, 0, context)]
    return replace(
        stream, tokens=stream.tokens[keep], positions=stream.positions[keep], parts=parts
    )


def ends(names: tuple[str, ...], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Returns the ids of the catalogue's names of what ends an answer; "sentinel" is every one: the
    next begins the span behind the one that is generated, and which that is depends on the prompt."""
    ids = [vocabulary.special[name] for name in names if name != "sentinel"]
    if "sentinel" in names:
        ids += map(vocabulary.sentinel, range(vocabulary.sentinels))
    return tuple(ids)


def window(stream: ConvertedStream, start: int, stop: int, before: int = 0) -> ConvertedStream:
    """Returns rows start to stop of a stream, which see rows before `stop` and `before` others.

    UserError where one of these rows sees a later one.
    """
    found: list[Part] = []
    for shape, q0, q1, k0, k1 in stream.parts:
        first, last = max(q0, start), min(q1, stop)
        if first >= last:
            continue
        if shape == CAUSAL:
            k1 -= q1 - last
        if k1 > before + stop:
            raise UserError(
                f"the prompt cannot be given in chunks: its tokens {q0} to {q1 - 1} see each other"
            )
        found.append((shape, first - start, last - start, k0, k1))
    return replace(
        stream,
        tokens=stream.tokens[start:stop],
        positions=stream.positions[start:stop],
        parts=found,
        cross_parts=[],
    )


def turn_block(
    turn: ConvertedStream, pending: int | None, position: np.ndarray, held: int
) -> ConvertedStream:
    """Returns a dialogue's next turn behind `held` kept tokens, whose mask is its own prompt's and sees all
    of these: with a bidirectional prefix, R[turn; 0:end of turn].

    turn: the turn's prompt in a decoder; its start token gives way to `pending`, the last token of the
    answer before, if there is one. position: int [A], of the first token.
    """
    skipped = int(pending is None)
    tokens = turn.tokens[1:] if pending is None else np.append(pending, turn.tokens[1:])
    shift = held - skipped
    parts = [] if pending is None else [full(0, 1, 0, held + 1)]
    for shape, q0, q1, _, k1 in turn.parts:
        q0 = max(q0, 1)
        if q0 < q1:
            parts.append((shape, q0 - skipped, q1 - skipped, 0, k1 + shift))
    positions = position + turn.positions[: len(tokens)] - turn.positions[0]
    return replace(turn, tokens=tokens, positions=positions, parts=parts)
