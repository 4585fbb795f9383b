"""The model `megaarch` of lm-evaluation-harness. Importing this file registers it."""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import distributed
from tqdm import tqdm

from megaarch.checkpoint import checkpoint
from megaarch.checkpoint.record import read_record
from megaarch.config.catalogue import OBJECTIVES
from megaarch.config.schema import Training
from megaarch.data.conditional_forms import ADDED
from megaarch.distributed import launch
from megaarch.errors import UserError
from megaarch.inference.generate import Generator, Options, Task
from megaarch.inference.sampling import Sampling, draw_keys
from megaarch.interchange.files import TRAINED
from megaarch.lm_eval.request_forms import FORMS, SHARED, TextForm
from megaarch.lm_eval.score import Score, TargetScorer
from megaarch.training.open_run import run_folder

log = logging.getLogger("megaarch")
ROWS = 8
PRECISIONS = get_args(Training.model_fields["precision"].annotation)
Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation


class GeneratorLM(TemplateLM):
    """A generator, whose processes hold the model together: each answers all requests.

    form: its name (request_forms.py). max_length: tokens of a row; None: the model's. rows: of a batch.
    text: tokens of a context and a continuation at most, with what a form adds; None: what the row holds.
    """

    def __init__(
        self,
        generator: Generator,
        form: str = "objective",
        max_length: int | None = None,
        rows: int = ROWS,
        quiet: bool = False,
        text: int | None = None,
    ):
        super().__init__()
        if form not in FORMS:
            raise UserError(f"form={form}: is not one of {', '.join(FORMS)}")
        self.generator, self.rows, self.quiet = generator, rows, quiet
        self.form: TextForm = FORMS[form](generator, max_length)
        if text is not None:
            self.form.max_length = min(self.form.max_length, max(text - ADDED, 2))
        self.backend = "seq2seq" if self.form.separate else "causal"
        self.max_length = self.form.max_length
        self.scorer = TargetScorer(generator, self.form.ends, rows)
        self.group = None
        self._device = generator.grid.device

    @property
    def eot_token_id(self) -> int:
        return self.form.eot

    @property
    def prefix_token_id(self) -> int:
        return self.form.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.generator.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness writes beside the results."""
        settings = self.generator.settings
        return {
            "model_form": self.form.name,
            "model_preset": settings.model.preset,
            "model_architecture": settings.model.architecture,
            "model_objective": settings.data.objective,
            "model_precision": settings.training.precision,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.form.encode(string, add_special_tokens)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns what the harness wants of continuations. UserError names the item of one that is empty."""
        if empty := [request for request in requests if not request.args[1]]:
            raise _lacks(empty[0], "continuation, which has no likelihood")
        return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.form.name == "objective" and self.form.separate:
            continuation = continuation.lstrip() or continuation  # as targets of pairs stand
        before, after = super()._encode_pair(context, continuation)
        return before, after or self.form.encode(continuation, False)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        self._warn_of_cut([request[1:] for request in requests])
        order = sorted(
            range(len(requests)), key=lambda i: (-sum(map(len, requests[i][1:])), requests[i][1:])
        )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._progress("loglikelihood", len(requests), disable_tqdm) as progress:
            for some in _chunks(order, 4 * self.rows):
                scores = self._scores([requests[i][1:] for i in some])
                for i, score in zip(some, scores, strict=True):
                    found[i] = score.loglikelihood, score.is_greedy
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                progress.update(len(some))
        return found

    def _warn_of_cut(self, pairs: Sequence[Pair]) -> None:
        apart = self.form.name == "hf" and self.form.separate  # else both share the room
        cut = sum(
            len(context) + (0 if apart else len(continuation) - 1) > self.max_length
            for context, continuation in pairs
        )
        if cut and not self.quiet and self.generator.grid.is_main:
            log.warning(
                "%d of %d contexts are longer than there is room for, and give way at their left end.",
                cut,
                len(pairs),
            )

    def _scores(self, pairs: Sequence[Pair]) -> list[Score]:
        return self.scorer([self.form.converted(*pair) for pair in pairs])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Returns each text's log-likelihood, in windows of as many tokens as the form scores without a context; the
        first one has none."""
        found: list[float] = []
        with self._progress("loglikelihood_rolling", len(requests), disable_tqdm) as progress:
            for some in _chunks(requests, self.rows):
                windows = [self._windows(*request.args) for request in some]
                scores = iter(self._scores([pair for of_text in windows for pair in of_text]))
                for request, of_text in zip(some, windows, strict=True):
                    found.append(sum(next(scores).loglikelihood for _ in of_text))
                    self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
                progress.update(len(some))
        return found

    def _windows(self, text: str) -> list[Pair]:
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.form.window, 1)
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Returns the answers. UserError for a model that cannot generate, and for an option of
        generation that is not known here."""
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(i)
        found = [""] * len(requests)
        with self._progress("generate_until", len(requests), disable_tqdm) as progress:
            for kwargs, places in alike.items():
                options = _options(json.loads(kwargs), self.rows)
                contexts = {i: self.tok_encode(requests[i].args[0]) for i in places}
                if empty := [i for i, tokens in contexts.items() if not tokens]:
                    raise _lacks(requests[empty[0]], "context, and an answer needs one")
                places.sort(key=lambda i: -len(contexts[i]))
                keys = draw_keys([np.array(contexts[i]) for i in places], options.sampling.seed)
                for some in _chunks(list(zip(places, keys, strict=True)), self.rows):
                    texts = self._answers(
                        [contexts[i] for i, _ in some], [k for _, k in some], options
                    )
                    for (i, _), text in zip(some, texts, strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    progress.update(len(some))
        return found

    def _answers(self, contexts: list[list[int]], keys: list[int], options: Options) -> list[str]:
        form, stops = self.form, options.stops
        made = [form.prompt(context, options.max_tokens) for context in contexts]
        prompts, encoded = [prompt for prompt, _ in made], [tokens for _, tokens in made]
        most = [form.most_tokens(tokens, options.max_tokens) for tokens in encoded]
        task = Task(self.generator, prompts, encoded, keys, replace(options, max_tokens=max(most)))
        return [form.text(answer, n, stops) for answer, n in zip(task.run(), most, strict=True)]

    def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
        raise UserError("--apply_chat_template: a run has no chat template: leave it out")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.apply_chat_template([]) if chat_template else None

    def set_cache_hook(self, cache_hook: Any) -> None:
        """UserError where several processes hold a model together: a cache of each, cut off at different
        places, would have them run different requests."""
        if self.generator.grid.size("tp") > 1:
            raise UserError("--use_cache: not with tensor_parallel above 1: leave one of them out")
        super().set_cache_hook(cache_hook)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._gathered(tensor.cpu())).to(tensor.device)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        gathered = self._gathered(obj)
        return gathered if self.rank == dst else None

    def _gathered(self, value: Any) -> list[Any]:
        held = [value] * self.world_size
        if self.group is not None:
            self.barrier()
            distributed.all_gather_object(held, value, group=self.group)
        return held

    def barrier(self) -> None:
        """Waits for every process: shares may end further apart than a collective of GPUs waits."""
        if (group := self.generator.grid.host_group) is not None:
            distributed.barrier(group)

    def _progress(self, name: str, total: int, disable: bool) -> tqdm:
        hidden = disable or self.quiet or not self.generator.grid.is_main
        return tqdm(total=total, desc=f"Running {name} requests", disable=hidden)


@register_model("megaarch")
class MegaarchLM(GeneratorLM):
    """A run. Several processes take a share of the requests each; `tensor_parallel` of them hold a model
    together.

    run: its folder, a checkpoint in it, or STUDY/CELL. form: "objective" or "hf" (request_forms.py); None: hf
    for a checkpoint that was converted from Hugging Face and not trained since, else objective. tokenizer:
    the run's file, where it is no longer where it was. precision: "fp32" or "bf16"; None: that of training.
    max_length: tokens of a row; None: the model's. batch_size: rows of a batch. device: "cpu", or else a GPU
    where there is one.
    """

    def __init__(
        self,
        run: str | None = None,
        form: str | None = None,
        tokenizer: str | None = None,
        precision: str | None = None,
        max_length: int | None = None,
        tensor_parallel: int = 1,
        batch_size: int | str = ROWS,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        if unknown or run is None:
            raise UserError(
                "--model_args: give run=RUN, and none but form, tokenizer, precision, max_length "
                f"and tensor_parallel beside it{': not ' + ', '.join(unknown) if unknown else ''}"
            )
        length = _whole("max_length", max_length)
        held_by = _whole("tensor_parallel", tensor_parallel) or 1
        rows = _whole("batch_size", batch_size) or _whole("max_batch_size", max_batch_size) or ROWS
        folder, overrides = run_folder(Path(run)), layout(held_by)
        overrides.append(f"training.device={'cpu' if device == 'cpu' else 'auto'}")
        if precision is not None:
            if precision not in PRECISIONS:
                raise UserError(f"precision={precision}: is not one of {', '.join(PRECISIONS)}")
            overrides.append(f"training.precision={precision}")
        generator = Generator.of_run(folder, overrides, tokenizer)
        if form is None:
            shared = generator.settings.model.architecture in SHARED
            form = "hf" if shared and converted_from_elsewhere(folder) else "objective"
        super().__init__(generator, form, length, rows)
        log.info("%s: the form is %s (docs/tasks.md)", folder, form)
        self.group = generator.grid.group("dp_replicate")
        self._rank = generator.grid.rank("dp_replicate")
        self._world_size = generator.grid.size("dp_replicate")
        if not OBJECTIVES[generator.settings.data.objective].comparable:
            log.warning("A pseudo-likelihood: its scores compare with no other objective's.")


def _lacks(request: Any, what: str) -> UserError:
    """Returns the sentence for an item of a task that lacks a text."""
    return UserError(
        f"item {request.doc_id} of the task {request.task_name} has an empty {what}: leave the item or the task out"
    )


def _whole(name: str, value: int | str | None) -> int | None:
    """Returns a number from 1 that was given as text; None for none and for auto. UserError for another."""
    text = str(value)
    if value is None or (name == "batch_size" and text.startswith("auto")):
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise UserError(f"{name}={text}: is not a whole number from 1")
    return int(text)


def layout(tensor_parallel: int) -> list[str]:
    """Returns the settings of a layout of all processes that were started: copies of the model, each held
    by `tensor_parallel` of them. UserError where these do not divide the processes."""
    processes = launch.find()[1].world_size
    if tensor_parallel < 1 or processes % tensor_parallel:
        raise UserError(
            f"tensor_parallel={tensor_parallel}: {processes} started processes do not divide by it"
        )
    sizes = dict.fromkeys(("pipeline", "context"), 1) | {"tensor": tensor_parallel}
    return [
        *(f"parallel.{axis}_parallel={size}" for axis, size in sizes.items()),
        "parallel.data_parallel_shard=1",
        f"parallel.data_parallel_replicate={processes // tensor_parallel}",
    ]


def converted_from_elsewhere(run: Path) -> bool:
    """Whether a run's newest checkpoint came from Hugging Face and has neither been trained here nor
    before it went there."""
    record = read_record(checkpoint.locate(run))
    trained = record.fingerprint is not None or record.progress.step > 0
    return not trained and Path(record.tokenizer.path).name not in TRAINED


def _options(given: dict[str, Any], rows: int) -> Options:
    """Returns what the harness's generation settings say. UserError for one that is not known here."""
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given))
    until, max_tokens = kwargs.pop("until", None) or [], kwargs.pop("max_gen_toks")
    heat = kwargs.pop("temperature", None)
    heat = (1.0 if heat is None else heat) if kwargs.pop("do_sample", False) else 0.0
    names = ("top_k", "top_p", "repetition_penalty")
    chosen = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
    if kwargs:
        raise UserError(
            f"generation_kwargs: {', '.join(kwargs)} is not known here: until, max_gen_toks, do_sample, "
            f"temperature, {', '.join(names)} are"
        )
    seed = torch.initial_seed()  # which --seed sets
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Options(max_tokens, Sampling(heat, seed=seed, **chosen), stops, rows)


def _chunks(items: Sequence, size: int) -> list:
    return [items[start : start + size] for start in range(0, len(items), size)]
