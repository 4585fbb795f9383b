"""Answers to prompts: text in, text out, in batches that share steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from megaarch.config import catalogue
from megaarch.config.schema import Model, Settings
from megaarch.data.example import ConvertedStream
from megaarch.data.row_lengths import spans_of
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.inference.decode import Decoding, Layout
from megaarch.inference.prompts import Prompt, prompt
from megaarch.inference.sampling import Sampler, Sampling, draw_keys
from megaarch.inference.text_stream import TextStream
from megaarch.ingest.tokenizer import Tokenizer
from megaarch.ingest.trained_tokenizer import tokenizer_of
from megaarch.model.transformer import Transformer
from megaarch.training.open_run import open_run

OF_TRAINING = {"compile": False, "float8": None, "float8_emulate": False}  # left out here
ROOM = 256  # new tokens that a cache has slots for at once
Say = Callable[[int, str], None]  # told the number of a prompt and the next piece of its answer


@dataclass(frozen=True)
class Options:
    """max_tokens: of an answer. stops: texts that end one. batch_size: prompts that share steps. chunk:
    tokens of a prompt that are run at a time, where its mask allows it; None: all."""

    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    batch_size: int = 8
    chunk: int | None = None

    def __post_init__(self):
        for name in ("max_tokens", "batch_size", "chunk"):
            value = getattr(self, name)
            is_whole = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and not (is_whole and int(value) >= 1):
                raise UserError(f"{name}: {value} is not a whole number from 1")
        if wrong := [stop for stop in self.stops if not isinstance(stop, str) or not stop]:
            raise UserError(f"stop: {wrong[0]!r} is not a text that can end an answer")


@dataclass
class Answer:
    """finish: "end" (the model ended it), "stop" (a stop string came), "length" (max_tokens) or
    "positions" (the model has no more)."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = ""


class Generator:
    """A trained model that continues text, in the conditional form of its objective. Every process of a
    grid calls the same with the same prompts."""

    def __init__(
        self, model: Transformer, settings: Settings, tokenizer: Tokenizer, grid: Grid | None = None
    ):
        self.model, self.settings, self.tokenizer = model.eval(), settings, tokenizer
        self.vocabulary = tokenizer.vocabulary
        self.grid = grid or Grid.single(next(model.parameters()).device)
        axes = catalogue.position_axes(settings.data.objective)
        self.layout = Layout(self.grid.device, axes, self.vocabulary.pad, self.grid.row_multiple)
        self.text_tokens = np.zeros(settings.model.vocabulary_size, dtype=bool)
        self.text_tokens[: self.vocabulary.size] = self.vocabulary.text

    @classmethod
    def of_run(cls, run: str | Path, overrides: Sequence[str] = (), tokenizer: str | None = None):
        """Returns the generator of a run's newest checkpoint, or of a converted one's.

        overrides: `--set` settings. tokenizer: the file, where it is no longer where it was. UserError
        for a folder without a complete checkpoint, another tokenizer, and a layout that cannot generate.
        """
        found = open_run(Path(run), overrides, OF_TRAINING, _check_layout)
        words = tokenizer_of(found.record, found.settings, tokenizer, Path(run))
        model = found.engine.model
        if found.grid.mesh is None and model.compute_dtype is not None:
            model.to(model.compute_dtype)  # once, and not at every step
        return cls(model, found.settings, words, found.grid)

    def prompt_of(self, tokens: np.ndarray) -> Prompt:
        """Returns the prompt of these token ids, in the model's own conditional form."""
        made = self.unbounded(tokens)
        check_room(made, self.settings.model)
        return made

    def unbounded(self, tokens: np.ndarray) -> Prompt:
        """Returns the same of any number of token ids, whether or not the model has positions for it."""
        model, data = self.settings.model, self.settings.data
        spans = spans_of(data)
        return prompt(data.objective, model.architecture, tokens, self.vocabulary, spans)

    def example(self) -> Prompt:
        """Returns a prompt of one token. UserError for a model that cannot generate."""
        return self.unbounded(np.flatnonzero(self.text_tokens)[:1])

    def allowed(self, made: Prompt) -> torch.Tensor:
        """Returns bool [vocabulary_size]: tokens of text, and what ends an answer."""
        allowed = self.text_tokens.copy()
        allowed[list(made.form.ends)] = True
        return self.layout.tensor(allowed)

    def answers(
        self,
        texts: Sequence[str | np.ndarray],
        options: Options | None = None,
        say: Say | None = None,
    ) -> Iterator[Answer]:
        """Yields the answers to `texts`, or to their token ids, in their order."""
        options = options or Options()
        self.example()  # a model that cannot generate is no fault of the first prompt
        encoded = [self.tokenizer.encode(t) if isinstance(t, str) else t for t in texts]
        prompts = []
        for n, tokens in enumerate(encoded):
            try:
                prompts.append(self.prompt_of(tokens))
            except UserError as error:
                raise UserError(
                    str(error) if len(texts) == 1 else f"prompt {n + 1}: {error}"
                ) from None
        keys = draw_keys(encoded, options.sampling.seed)
        for first in range(0, len(texts), options.batch_size):
            rows = slice(first, first + options.batch_size)
            task = Task(self, prompts[rows], encoded[rows], keys[rows], options, say, first)
            yield from task.run()


def _check_layout(settings: Settings) -> None:
    for name in ("pipeline_parallel", "context_parallel"):
        if getattr(settings.parallel, name) > 1:
            raise UserError(
                f"parallel.{name}: generation runs under tensor and sharded data parallelism alone: set it "
                "to 1, or run one process, which reads a checkpoint of any layout"
            )


class Task:
    """The answers to one batch of prompts: rows leave it when their answers end. first: the number of the
    first prompt, for `say`. decoding: what runs it; None: one of its own, from the prompts' start."""

    def __init__(
        self,
        generator: Generator,
        prompts: list[Prompt],
        encoded: list[np.ndarray],
        keys: list[int],
        options: Options,
        say: Say | None = None,
        first: int = 0,
        decoding: Decoding | None = None,
    ):
        self.options, self.say, self.first = options, say, first
        model, form = generator.settings.model, prompts[0].form
        self.ends = set(form.ends)
        self.room = [min(options.max_tokens, room(p, model)) for p in prompts]
        self.rows = list(range(len(prompts)))  # of the prompts whose answers go on
        self.answers = [Answer() for _ in prompts]
        before = encoded if form.follows else [[]] * len(prompts)
        self.texts = [TextStream(generator.tokenizer, ids, options.stops) for ids in before]
        allowed = generator.allowed(prompts[0])
        self.sampler = Sampler(options.sampling, encoded, keys, allowed)
        at_once = min(max(self.room), ROOM)
        self.decoding = decoding or Decoding(
            generator.model, generator.layout, prompts, options.chunk, at_once
        )

    def run(self, streams: Sequence[ConvertedStream] | None = None) -> list[Answer]:
        """Returns the answers. streams: what is run behind what `decoding` holds; None: the prompts."""
        decoding = self.decoding
        logits = decoding.start() if streams is None else decoding.go_on(streams)
        while True:
            tokens = self.sampler(logits)
            going = self.take(tokens)
            if not going:
                return self.answers
            if len(going) < len(self.rows):
                tokens = tokens[going]
                self.rows = [self.rows[place] for place in going]
                decoding.select(going)
                self.sampler.select(going)
            logits = decoding.step(tokens)

    def take(self, tokens: np.ndarray) -> list[int]:
        """Adds a token to each answer that goes on; returns the places, in the batch, of those that
        still do."""
        going = []
        for place, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            answer = self.answers[row]
            if token in self.ends:
                answer.finish = "end"
            else:
                answer.tokens.append(token)
                self.tell(row, self.texts[row].push(token))
                if self.texts[row].stopped:
                    answer.finish = "stop"
                elif len(answer.tokens) == self.room[row]:
                    full = self.room[row] < self.options.max_tokens
                    answer.finish = "positions" if full else "length"
            if answer.finish:
                self.tell(row, self.texts[row].finish())
            else:
                going.append(place)
        return going

    def tell(self, row: int, text: str) -> None:
        self.answers[row].text += text
        if text and self.say is not None:
            self.say(self.first + row, text)


def position_limit(model: Model) -> int | None:
    """Returns how many positions the model knows; None: any."""
    if model.position_encoding == "learned":
        return model.position_rows
    if model.position_encoding == "rope":
        return max(model.sequence_length, model.target_length or 0)
    return None


def room(made: Prompt, model: Model) -> int:
    """Returns the number of tokens for which there are positions behind a prompt; 0 where it has too many
    itself."""
    limit = position_limit(model)
    if limit is None:
        return 1 << 40
    if longest(made) > limit:
        return 0
    advance = np.array(made.form.advance)
    left = (limit - made.next_position)[advance > 0]
    return int(left.min()) + (made.form.probe is None)


def longest(made: Prompt) -> int:
    """Returns the positions that a prompt, or its encoder's, takes."""
    streams = [made.stream] if made.encoder is None else [made.encoder, made.stream]
    return max(int(s.positions.max()) + 1 for s in streams)


def check_room(made: Prompt, model: Model, what: str = "prompt") -> None:
    """UserError where a prompt leaves no position for a new token. what: its name in the sentence."""
    if room(made, model) < 1:
        raise UserError(
            f"the {what} takes {longest(made)} positions, with what stands beside it, and the model knows "
            f"{position_limit(model)}: shorten it"
        )


def generate(
    run: str | Path | Generator,
    prompts: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    batch_size: int = 8,
) -> str | list[str]:
    """Returns the text that a trained model continues a prompt with, or a list of them for a list.

    run: a run's folder, or its `Generator`, which keeps the model loaded. The settings are those of
    `Sampling` and `Options`. UserError for what cannot be generated from.
    """
    generator = run if isinstance(run, Generator) else Generator.of_run(run)
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    options = Options(max_tokens, sampling, stops, batch_size)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    found = [answer.text for answer in generator.answers(texts, options)]
    return found[0] if isinstance(prompts, str) else found
