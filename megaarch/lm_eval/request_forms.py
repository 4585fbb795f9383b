"""How a context, and a continuation of it, reach a model.

`Objective`: in the conditional form of the objective that the run was trained with, as yardsticks and
`megaarch generate` have it (data/conditional_forms.py, inference/prompts.py).

`Transformers`: as `lm_eval --model hf` gives them to the model's Hugging Face folder, so that a converted
model's results are those that others publish. x is what the tokenizer's template puts ahead or behind.

    causal     x p c                      C[0:n; 0:n]
    seq2seq    encoder p x, decoder ^ c   R[0:p; 0:p], C[0:c; 0:c], cross
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from megaarch.attention.mask import causal, full
from megaarch.config.catalogue import OBJECTIVES
from megaarch.data.conditional_forms import ADDED
from megaarch.data.example import Converted, Example, TooManySpans
from megaarch.data.feature_converters import (
    CAUSAL_DECODER,
    ENCODER_DECODER,
    converted_continuation,
    stream_of,
)
from megaarch.data.row_lengths import longest_example, longest_streams, spans_of
from megaarch.errors import UserError
from megaarch.inference.generate import Answer, Generator, longest, position_limit, room
from megaarch.inference.prompts import Form, Prompt, ends

UNSET = 10**9  # tokenizers without a limit state one above
LENGTH = 2048  # lm_eval's, where neither the model nor its tokenizer has a limit
Made = TypeVar("Made")
SHARED = ("causal_decoder", "prefix_decoder", "encoder_decoder")  # architectures that its `hf` runs


class Objective:
    """The form of the run's objective. Its own start token stands for an empty context.

    separate: whether a continuation is tokenized by itself. prefix: the id that stands for an empty
    context. ends: ids that end an answer. row: positions that they and what the form adds may take;
    streams: in each stream.
    max_length: tokens of a context and a continuation together (causal), or of each: no more than
    training had in an example.
    """

    name = "objective"

    def __init__(self, generator: Generator, max_length: int | None = None):
        settings, words = generator.settings, generator.vocabulary
        self.generator, self.vocabulary = generator, words
        self.objective, self.architecture = settings.data.objective, settings.model.architecture
        self.separate = self.objective == "supervised"
        self.prefix, self.eot = words.bos, words.eos
        self.ends = ends(OBJECTIVES[self.objective].ends, words)
        row, limit = max_length or settings.model.sequence_length, position_limit(settings.model)
        if limit is not None and row > limit:
            raise UserError(
                f"max_length: {row} is more than the {limit} positions that the model knows"
            )
        self.row, text = row, row
        if max_length is None and not OBJECTIVES[self.objective].of_pairs:
            text, positions = longest_example(settings.model, settings.data)
            text = min(row, text, max(positions))
        self.spans = spans_of(settings.data, settings.model)
        self.streams = longest_streams(settings.model, settings.data)
        if max_length is not None:
            self.streams = (row,) * len(self.streams)
        self.max_length = text - ADDED
        if self.max_length < 2:
            raise UserError(f"max_length: {text} leaves no room beside the form's own tokens")

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        return self.generator.tokenizer.encode(text).tolist()

    def converted(self, context: list[int], continuation: list[int]) -> list[Converted]:
        """The context gives way at its left end. UserError for a continuation that is too long by itself."""
        if context[:1] == [self.prefix]:
            context = context[1:]
        scored = np.array(continuation, dtype=np.int64)
        most = self.max_length + 1 - len(scored)  # the last token is not fed

        def made_of(prefix: np.ndarray) -> list[Converted] | None:
            made = converted_continuation(
                self.objective, self.architecture, prefix, scored, self.vocabulary, self.spans
            )
            fit = (
                taken <= most
                for each in made
                for taken, most in zip(each.positions, self.streams, strict=True)
            )
            return made if all(fit) else None

        prefix = np.array(context[-most:], dtype=np.int64)
        found = _of_longest_end(prefix, 0, made_of) if most > 0 else None
        if found is None:
            raise UserError(
                f"a continuation of {len(continuation)} tokens has no room in the model's row of {self.row}, of "
                f"which text takes {self.max_length}: leave the task out"
            )
        return found

    @cached_property
    def window(self) -> int:
        """The most tokens of a continuation without a context: fewer than `max_length` where a decoder beside an
        encoder holds fewer, or the vocabulary has too few sentinels for their form."""
        word = int(self.vocabulary.text.argmax())

        def lacks(length: int) -> bool:
            try:
                return not self.converted([], [word] * length)
            except UserError:
                return True

        return max(1, bisect_left(range(1, self.max_length + 1), True, key=lacks))

    def prompt(self, context: list[int], max_tokens: int) -> tuple[Prompt, np.ndarray]:
        """The context gives way at its left end to `max_tokens`, up to half of what there is."""
        model = self.generator.settings.model
        limit, most = position_limit(model), self.max_length
        if limit is not None and self.architecture != "encoder_decoder":
            most = max(min(most, limit - ADDED - max_tokens), self.max_length // 2)
        wanted, row = min(max_tokens, self.max_length // 2), self.row

        def made_of(given: np.ndarray) -> tuple[Prompt, np.ndarray] | None:
            made = self.generator.unbounded(given)
            return (made, given) if longest(made) <= row and room(made, model) >= wanted else None

        tokens = np.array(context[-most:], dtype=np.int64)
        last = tokens[-1:]
        return _of_longest_end(tokens, 1, made_of) or (self.generator.prompt_of(last), last)

    def most_tokens(self, context: np.ndarray, max_tokens: int) -> int:
        return max_tokens

    def text(self, answer: Answer, most: int, stops: tuple[str, ...]) -> str:
        return answer.text


class Transformers:
    """What transformers' tokenizer of the converted folder, and `lm_eval --model hf`, make of a text."""

    name = "hf"

    def __init__(self, generator: Generator, max_length: int | None = None):
        """UserError where transformers, or the folder's tokenizer, is missing."""
        self.generator, model = generator, generator.settings.model
        if model.architecture not in SHARED:
            raise UserError(
                f"form=hf: lm_eval --model hf runs no {model.architecture}: leave it out"
            )
        self.tokenizer = _tokenizer_of(Path(generator.tokenizer.path).parent)
        self.separate = model.architecture == "encoder_decoder"
        self.eot = self.tokenizer.eos_token_id
        self.prefix = (
            self.eot if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        )
        if self.prefix is None:
            raise UserError("form=hf: the folder's tokenizer names neither a bos nor an eos token")
        self.start = generator.vocabulary.bos  # of a decoder beside an encoder
        self.ends = () if self.eot is None else (self.eot,)
        told = self.tokenizer.model_max_length
        limit = position_limit(model) or (told if told < UNSET else LENGTH)
        self.max_length = max_length or limit
        generator.text_tokens[: generator.tokenizer.base_size] = True  # all of the file's own ids

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(self.tokenizer.decode([self.prefix]))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def converted(self, context: list[int], continuation: list[int]) -> list[Converted]:
        """The context gives way at its left end. UserError for a continuation that is too long by itself."""
        if self.separate:
            convert, fed = ENCODER_DECODER, None
            given, scored = context[-self.max_length :], continuation[-self.max_length :]
        else:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens has no room in the model's "
                    f"{self.max_length}: leave the task out"
                )
            convert, scored = CAUSAL_DECODER, continuation
            row = np.array([*context, *continuation][-self.max_length - 1 : -1])
            given, fed = np.split(row, [len(row) - len(scored)])
        example = Example(np.array(given, dtype=np.int64), np.array(scored), feed=fed)
        return [convert(example, self.generator.vocabulary)]

    @property
    def window(self) -> int:
        """The most tokens of a continuation without a context."""
        return self.max_length

    def prompt(self, context: list[int], max_tokens: int) -> tuple[Prompt, np.ndarray]:
        """UserError where an answer of `max_tokens` leaves no room for a context, as the harness says."""
        form = Form((1,), None, True, self.ends, follows=False)
        most = self.max_length - (0 if self.separate else max_tokens)
        if most < 1:
            raise UserError(
                f"max_gen_toks: {max_tokens} has to be below the model's {self.max_length} positions: "
                "lower it (--gen_kwargs max_gen_toks=N)"
            )
        tokens = context[-most:]
        if self.separate:
            made = Prompt(form, stream_of([self.start], causal), stream_of(tokens, full))
        else:
            made = Prompt(form, stream_of(tokens, causal))
        return made, np.array(tokens, dtype=np.int64)

    def most_tokens(self, context: np.ndarray, max_tokens: int) -> int:
        """A decoder beside an encoder is given as many more as the encoder has, less its start token:
        `lm_eval --model hf` counts the context there too (at its batch size of 1)."""
        return max_tokens + (len(context) - 1 if self.separate else 0)

    def text(self, answer: Answer, most: int, stops: tuple[str, ...]) -> str:
        """Returns the answer's tokens as transformers decodes them by themselves, up to a stop."""
        text = self.tokenizer.decode(answer.tokens[:most], skip_special_tokens=True)
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text


def _of_longest_end(
    tokens: np.ndarray, least: int, make: Callable[[np.ndarray], Made | None]
) -> Made | None:
    """What `make` makes of the longest end of `tokens` for which there is room; None where not even `least`
    have some. Forms add a share of their context: its sentinels, or all of it once more."""

    def of_end(number: int) -> Made | None:
        try:
            return make(tokens[len(tokens) - number :])
        except TooManySpans:
            return None

    if (whole := of_end(len(tokens))) is not None:
        return whole
    lengths = range(least, len(tokens))
    fitting = bisect_left(lengths, True, key=lambda number: of_end(number) is None)
    return of_end(lengths[fitting - 1]) if fitting else None


TextForm = Objective | Transformers
FORMS: dict[str, type[TextForm]] = {form.name: form for form in (Objective, Transformers)}


def _tokenizer_of(folder: Path):
    try:
        import transformers
    except ImportError:
        raise UserError(
            "form=hf reads a text as transformers does, which is missing: pip install transformers, or "
            "give form=objective"
        ) from None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,  # None asks at the terminal
        )
    except Exception as error:  # of many kinds
        raise UserError(
            f"form=hf: transformers finds no tokenizer in {folder} ({str(error).splitlines()[0][:120]}): "
            "give form=objective"
        ) from error
