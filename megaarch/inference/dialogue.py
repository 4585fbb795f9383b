"""A dialogue: turns of text and a model's answers, with as much of the cache kept as its mask allows.

A causal decoder's cache serves on: a new turn's tokens see what is there. In every other model the turns
so far are inputs that see the new turn, or pass through an encoder that does, so they run anew; unless a
prefix decoder is asked for turn blocks, in which a turn sees itself and what came before it.
"""

import numpy as np
import torch

from megaarch.data.example import ConvertedStream
from megaarch.data.prompts import Prompt, turn_block
from megaarch.errors import UserError
from megaarch.inference.decode import Decoding
from megaarch.inference.generate import Answer, Generator, Options, Say, Task, check_room
from megaarch.inference.sampling import draw_keys
from megaarch.inference.turns import has_turn_blocks, rest


class Dialogue:
    """turn_blocks: of a prefix decoder, whose cache then serves all turns; a mask that it was not
    trained on. UserError for a model that cannot generate, and for turn blocks where it has no such mask."""

    def __init__(
        self, generator: Generator, options: Options | None = None, turn_blocks: bool = False
    ):
        self.generator, self.options = generator, options or Options()
        self.turn_blocks = turn_blocks
        self.history: list[int] = []
        self.decoding: Decoding | None = None
        self.kept: list[int] = []  # the tokens that the cache holds
        self.pending: int | None = None  # the last token of an answer, which has not run yet
        made, settings = (
            generator.prompt_of(np.flatnonzero(generator.text_tokens)[:1]),
            generator.settings,
        )
        if turn_blocks and not has_turn_blocks(made):
            raise UserError(
                f"turn blocks are a mask of decoders whose answers follow in the prompt's row: "
                f"{settings.model.architecture} of {settings.data.objective} has none"
            )

    def say(self, text: str, say: Say | None = None) -> Answer:
        """Returns the answer to the next turn; `say` is told its pieces. UserError for an empty turn, and
        where the dialogue has reached the model's last position."""
        new = self.generator.tokenizer.encode(text)
        if not len(new):
            raise UserError("the turn is empty: give text to answer")
        tokens = np.array([*self.history, *new])
        made = self.generator.prompt_of(tokens)
        stream = self._rest(made, new)
        if stream is not None:
            made = Prompt(made.form, stream)
            check_room(made, self.generator.settings.model)
        keys = draw_keys([tokens], self.options.sampling.seed)
        task = Task(self.generator, [made], [tokens], keys, self.options, say)
        decoding, self.decoding = self.decoding, None  # lost where a step is interrupted
        self.history = tokens.tolist()
        try:
            with torch.no_grad():
                if stream is None or decoding is None:
                    decoding = task.decoding()
                    logits = decoding.start()
                else:
                    logits = decoding.go_on([stream])
                (answer,) = task.run(decoding, logits)
            self.decoding = decoding
        finally:
            given = task.answers[0].tokens
            # one that the model ended has run whole: what ended it was read off at its last token
            ran = len(given) if task.answers[0].finish == "end" else max(0, len(given) - 1)
            self.history += given
            self.kept = [*(self.kept if stream else []), *made.stream.tokens.tolist(), *given[:ran]]
            self.pending = given[-1] if ran < len(given) else None
        return answer

    def _rest(self, made: Prompt, new: np.ndarray) -> ConvertedStream | None:
        """Returns what is to be run behind the cache; None: all, from the start."""
        if self.decoding is None:
            return None
        if self.turn_blocks:
            turn, held = self.generator.prompt_of(new).stream, len(self.kept)
            return turn_block(turn, self.pending, self.decoding.positions[0], held)
        return rest(made, np.array(self.kept))
