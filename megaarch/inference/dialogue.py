"""A dialogue: turns of text and a model's answers, with as much of the cache kept as its mask allows.

A causal decoder's cache serves on: a new turn's tokens see what is there. In every other model the turns
so far are inputs that see the new turn, or pass through an encoder that does, so they run anew; unless a
prefix decoder is asked for turn blocks, in which a turn sees itself and what came before it.

Where the model's positions end the oldest turns leave, whole, and the rest runs anew.
"""

import logging
from contextlib import suppress

import numpy as np

from megaarch.data.example import ConvertedStream, TooManySpans
from megaarch.errors import UserError
from megaarch.inference.decode import Decoding
from megaarch.inference.dialogue_cost import TURN_BLOCKS, policies, rest
from megaarch.inference.generate import (
    Answer,
    Generator,
    Options,
    Say,
    Task,
    check_room,
    position_limit,
    room,
)
from megaarch.inference.prompts import Prompt, turn_block
from megaarch.inference.sampling import draw_keys

log = logging.getLogger("megaarch")


class Dialogue:
    """turn_blocks: of a prefix decoder, whose cache then serves all turns; a mask that it was not
    trained on. UserError for a model that cannot generate, and for turn blocks where it has no such mask."""

    def __init__(
        self, generator: Generator, options: Options | None = None, turn_blocks: bool = False
    ):
        self.generator, self.options = generator, options or Options()
        self.turn_blocks = turn_blocks
        self.turns: list[list[int]] = []  # the tokens of each with its answer's
        self.decoding: Decoding | None = None
        self.kept: list[int] = []  # the tokens that the cache holds
        self.pending: int | None = None  # the last token of an answer, which has not run yet
        self.told = False  # that turns left
        made = generator.example()
        if turn_blocks and TURN_BLOCKS not in policies(
            generator.unbounded, made.stream.tokens[-1:]
        ):
            model, objective = generator.settings.model, generator.settings.data.objective
            raise UserError(
                "turn blocks serve a prefix decoder whose answers follow in the prompt's row, and not "
                f"{model.architecture} of {objective}: leave out --turn-blocks"
            )

    @property
    def history(self) -> list[int]:
        return [token for turn in self.turns for token in turn]

    def say(self, text: str, say: Say | None = None) -> Answer:
        """Returns the answer to the next turn; `say` is told its pieces. UserError for a turn that is empty,
        or has no room by itself: the dialogue stays as it was."""
        new = self.generator.tokenizer.encode(text)
        if not len(new):
            raise UserError("the turn is empty: give text to answer")
        made = self._make_room(new)
        tokens = np.array([*self.history, *new])
        stream = self._rest(made, new)
        if stream is not None:
            made = Prompt(made.form, stream)
        keys = draw_keys([tokens], self.options.sampling.seed)
        behind = None if stream is None else self.decoding
        task = Task(self.generator, [made], [tokens], keys, self.options, say, decoding=behind)
        self.decoding = None  # lost where a step is interrupted
        turn = new.tolist()
        self.turns.append(turn)
        try:
            (answer,) = task.run(None if stream is None else [stream])
            self.decoding = task.decoding
        except UserError:
            self.turns.pop()
            raise
        finally:
            given = task.answers[0].tokens
            # one that the model ended has run whole: what ended it was read off at its last token
            ran = len(given) if task.answers[0].finish == "end" else max(0, len(given) - 1)
            turn += given
            self.kept = [*(self.kept if stream else []), *made.stream.tokens.tolist(), *given[:ran]]
            self.pending = given[-1] if ran < len(given) else None
        return answer

    def _make_room(self, new: np.ndarray) -> Prompt:
        """Returns the prompt of the dialogue with a new turn. The oldest turns leave until it has room for
        max_tokens or half of the model's positions, whichever is less."""
        of, model = self.generator, self.generator.settings.model
        alone = of.unbounded(new)
        check_room(alone, model, "turn")
        wanted = min(self.options.max_tokens, (position_limit(model) or 0) // 2)
        before = len(self.turns)
        while self.turns:
            with suppress(TooManySpans):
                made = of.unbounded(np.array([*self.history, *new]))
                if room(made, model) >= wanted:
                    break
            del self.turns[0]
        else:
            made = alone
        if len(self.turns) < before:
            self.decoding = None
            if not self.told:
                log.warning(
                    "megaarch: from here on the dialogue's oldest turns leave it to make room"
                )
            self.told = True
        return made

    def _rest(self, made: Prompt, new: np.ndarray) -> ConvertedStream | None:
        """Returns what is to be run behind the cache; None: all, from the start."""
        if self.decoding is None:
            return None
        if self.turn_blocks:
            turn, held = self.generator.prompt_of(new).stream, len(self.kept)
            return turn_block(turn, self.pending, self.decoding.positions[0], held)
        return rest(made, np.array(self.kept))
