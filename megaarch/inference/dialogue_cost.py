"""What the turns of a dialogue run, and what the cache holds, in closed form.

    recompute     every turn runs the whole dialogue so far
    reuse         a turn runs alone where the cache serves on, as `Dialogue` decides it; else the whole
    turn_blocks   a turn runs alone under the mask of turn blocks

A prompt with its answer is a dialogue of one turn. Nothing is computed here: counts follow from the form of
the prompt (inference/prompts.py) and equal those of `Decoding`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from torch.utils._pytree import tree_map

from megaarch.attention.mask import area
from megaarch.config.schema import Model
from megaarch.data.batch import Counts
from megaarch.data.example import ConvertedStream, Tokens
from megaarch.errors import UserError
from megaarch.inference.memory_traffic import cache_bytes
from megaarch.inference.prompts import Prompt, turn_block, window

TURN_BLOCKS = "turn_blocks"
POLICIES = ("recompute", "reuse", TURN_BLOCKS)
PromptOf = Callable[[Tokens], Prompt]  # of a text, in the model's form


@dataclass(frozen=True)
class Call:
    """One call of the model. keys, memory: tokens of the cache, and of the encoder's output, that
    attention of the last stack reads in each row."""

    counts: Counts
    keys: int
    memory: int


@dataclass(frozen=True)
class Turn:
    """What a turn runs on `rows` rows that are alike.

    prompt: of the dialogue so far. stream: what runs in the last stack, its parts' keys being slots.
    held: tokens that the cache has before; 0: the prompt runs whole. answer: its tokens, of which the first
    is read off the prompt and the last is not run.
    """

    prompt: Prompt
    stream: ConvertedStream
    held: int
    answer: int
    rows: int = 1

    @property
    def steps(self) -> int:
        """Calls after the first, each of which gives one token of the answer."""
        return self.answer - 1

    @property
    def memory(self) -> int:
        """Tokens of the encoder's output."""
        return 0 if self.prompt.encoder is None else len(self.prompt.encoder.tokens)

    @property
    def axes(self) -> int:
        return self.stream.positions.shape[1]

    @property
    def prefill(self) -> Call:
        """The call that runs the prompt; it gives the first token of the answer."""
        new, pairs = len(self.stream.tokens), sum(map(area, self.stream.parts))
        keys = int(max(part[4] for part in self.stream.parts))
        encoder = self.prompt.encoder if self.held == 0 else None
        return self._call(new, pairs, keys, encoder)

    def step(self, number: int) -> Call:
        """The call of this number, from 1 to `steps`."""
        form, width = self.prompt.form, self.prompt.form.width
        keys = self._kept(number - 1) + width
        pairs = width * keys
        if form.probe is not None:
            pairs, keys = (pairs - 1, keys) if form.sees_itself else (pairs - width, keys - 1)
        return self._call(width, pairs, keys, None)

    @property
    def counts(self) -> Counts:
        """The counts of all that the turn runs. Each step has the same number of pairs more than the one
        before."""
        if not self.steps:
            return self.prefill.counts
        both = self.step(1).counts + self.step(self.steps).counts
        steps = Counts(*tree_map(lambda number: number * self.steps // 2, astuple(both)))
        return self.prefill.counts + steps

    @property
    def kept(self) -> int:
        """Tokens of a row that the cache holds at the turn's end."""
        return self._kept(self.steps)

    def cache_bytes(self, model: Model, element: int) -> int:
        """Returns the bytes of the slots in use at the turn's end. A `Cache` makes room for an answer
        ahead and doubles its slots, so that it may hold up to twice as many."""
        return self.rows * cache_bytes(model, self.axes, self.kept, self.memory, element)

    def _kept(self, steps: int) -> int:
        return self.held + len(self.stream.tokens) - (self.prompt.form.probe is not None) + steps

    def _call(self, new: int, pairs: int, keys: int, encoder: ConvertedStream | None) -> Call:
        rows, memory = self.rows, self.memory
        crossed = (rows * new * memory,)
        tokens, areas = (rows * new,), (rows * pairs,)
        if self.prompt.encoder is not None:
            ran = 0 if encoder is None else rows
            tokens = (ran * memory, *tokens)
            areas = (ran * sum(map(area, self.prompt.encoder.parts)), *areas)
            crossed = (0, *crossed)
        return Call(Counts(rows, tokens, areas, crossed, rows, tokens), keys, memory)


def dialogue(
    prompt_of: PromptOf,
    texts: Sequence[Tokens],
    answers: Sequence[Tokens],
    policy: str,
    rows: int = 1,
) -> Iterator[Turn]:
    """Yields a dialogue's turns. texts, answers: token ids of each turn, of any length from 1; an answer is
    taken to end by its length. policy: one of `policies`. rows: dialogues in a batch, all of these
    lengths."""
    history, kept, pending = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), None
    position = None
    for text, answer in zip(texts, answers, strict=True):
        history = np.append(history, text)
        made, stream = prompt_of(history), None
        if position is not None and policy == "reuse":
            stream = rest(made, kept)
        elif position is not None and policy == "turn_blocks":
            stream = turn_block(prompt_of(text).stream, pending, position, len(kept))
        if stream is None:
            kept, stream = kept[:0], made.stream
        yield Turn(made, stream, len(kept), len(answer), rows)
        history, pending = np.append(history, answer), int(answer[-1])
        kept = np.concatenate((kept, stream.tokens, answer[:-1]))
        position = stream.positions[-1] + len(answer) * np.array(made.form.advance)


def rest(made: Prompt, kept: Tokens) -> ConvertedStream | None:
    """Returns what is left of a prompt to run behind tokens that the cache holds; None where these do not
    begin its row, or would see the rest."""
    held = len(kept)
    if made.encoder is not None or made.form.probe is not None:
        return None
    if not np.array_equal(kept, made.stream.tokens[:held]):
        return None
    try:
        window(made.stream, 0, held)
    except UserError:
        return None
    return window(made.stream, held, len(made.stream.tokens))


def policies(prompt_of: PromptOf, text: Tokens) -> tuple[str, ...]:
    """Returns the policies that differ for a model: turn blocks are for decoders whose answers follow in the
    prompt's row and whose cache would not serve on by itself."""
    made = prompt_of(text)
    if made.encoder is not None or made.form.probe is not None or made.form.advance != (1,):
        return POLICIES[:2]
    serves = rest(prompt_of(np.append(text, text)), made.stream.tokens) is not None
    return POLICIES[:2] if serves else POLICIES
