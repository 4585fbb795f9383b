"""How long generation takes on one GPU: counts of inference/dialogue_cost.py at the GPU's rates.

A call takes the longer of two times: of its FLOPs, and of the bytes that it moves (a roofline, Williams et
al. 2009). What starts kernels is left out, so that a small model is slower than this.
"""

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megaarch import config
from megaarch.config.schema import Model, Parallel, Settings
from megaarch.errors import UserError
from megaarch.inference.dialogue_cost import Call, Turn, dialogue, policies
from megaarch.inference.generate import position_limit, room
from megaarch.inference.memory_traffic import cache_bytes, memory_traffic
from megaarch.inference.prompts import prompt
from megaarch.model import flops
from megaarch.model.parameter_count import parameter_count
from megaarch.planner.hardware_rates import Cluster, Rates
from megaarch.planner.layer_costs import HALF, Work
from megaarch.planner.software_stacks import OURS
from megaarch.study.cells import expand
from megaarch.study.describe import made_up_tokens, made_up_vocabulary

MOST_TOKENS, MOST_TURNS = 1 << 20, 64  # of a dialogue


@dataclass(frozen=True)
class Lengths:
    """The tokens of each turn of a dialogue and of its answer."""

    prompt: int = 512
    answer: int = 128
    turns: int = 3
    batch: int = 1

    def __post_init__(self):
        for name, value in vars(self).items():
            most = MOST_TURNS if name == "turns" else MOST_TOKENS
            if not 1 <= value <= most:
                raise UserError(f"--{name} {value}: is not a number from 1 to {most:,}")
        if self.turns * (self.prompt + self.answer) > MOST_TOKENS:
            raise UserError(
                f"--turns {self.turns} of {self.prompt} and {self.answer} tokens are more than "
                f"{MOST_TOKENS:,} together: give fewer"
            )


@dataclass(frozen=True)
class TurnCost:
    """What a turn of a batch's dialogues costs. token_seconds: of each token after the first, on average,
    and limit: what the last of them waits for, "compute" or "bandwidth"; None where there are none. flops:
    exact. cache_bytes: at the turn's end. reused_tokens: of each dialogue, which the cache had before."""

    first_token_seconds: float
    token_seconds: float | None
    limit: str | None
    flops: int
    moved_bytes: int
    cache_bytes: int
    reused_tokens: int

    def seconds(self, answer: int) -> float:
        """Returns the time of the whole turn, with an answer of so many tokens."""
        return self.first_token_seconds + (answer - 1) * (self.token_seconds or 0.0)


@dataclass(frozen=True)
class InferenceCost:
    """What inference costs one model. cache_bytes_per_*: what the cache holds of a first turn, for each of
    its tokens, and what a token of an answer adds. dialogues: the turns under each policy."""

    name: str
    weight_bytes: int
    cache_bytes_per_prompt_token: float
    cache_bytes_per_answer_token: int
    dialogues: dict[str, list[TurnCost]]

    @property
    def fullest_cache(self) -> int:
        return max(turn.cache_bytes for turns in self.dialogues.values() for turn in turns)

    def fits(self, cluster: Cluster) -> bool:
        """Whether the GPU has room for weights and the fullest cache."""
        return self.weight_bytes + self.fullest_cache <= cluster.room()


def costs(
    raw: config.Raw, cluster: Cluster, lengths: Lengths, pattern: str = "*"
) -> Iterator[tuple[str, InferenceCost | UserError]]:
    """Yields the name and the costs of each model of a study, or of the one model; or why it cannot
    generate so much. pattern: of the names, as a shell's. UserError where it matches none."""
    models = _models(raw)
    chosen = fnmatch.filter(models, pattern)
    if not chosen:
        raise UserError(f"--cell {pattern}: names no model; there are {', '.join(models)}")
    for name in chosen:
        try:
            yield name, cost(name, models[name], cluster, lengths)
        except UserError as error:
            yield name, error


def _models(raw: config.Raw) -> dict[str, Settings]:
    """Returns the models of a study by name, whatever their seeds and budgets."""
    settings = config.resolve(raw)
    if settings.study is None:
        return {settings.model.preset or settings.model.architecture: settings}
    cells = expand(raw, Path("runs") / settings.study.name)
    return {f"{c.name}/{c.size}" if c.size else c.name: c.settings for c in cells}


def cost(name: str, settings: Settings, cluster: Cluster, lengths: Lengths) -> InferenceCost:
    """Returns the costs of a model in bf16. UserError where it cannot generate so much."""
    model, data = settings.model, settings.data
    vocabulary = made_up_vocabulary(model.vocabulary_size, data.sentinels)
    prompt_of = partial(prompt, data.objective, model.architecture, vocabulary=vocabulary)
    text, answer = (made_up_tokens(vocabulary, n) for n in (lengths.prompt, lengths.answer))
    whole = prompt_of(np.resize(text, lengths.turns * (len(text) + len(answer)) - len(answer)))
    if room(whole, model) < lengths.answer:
        raise UserError(
            f"{lengths.turns} turn(s) of {lengths.prompt} tokens with answers of {lengths.answer} take more "
            f"than the {position_limit(model)} positions that the model knows: give fewer, or set "
            "model.sequence_length"
        )
    all_alike = [text] * lengths.turns, [answer] * lengths.turns
    dialogues = {
        policy: list(dialogue(prompt_of, *all_alike, policy, lengths.batch))
        for policy in policies(prompt_of, text)
    }
    first = dialogues["recompute"][0]
    of_prompt = replace(first, answer=1, rows=1).cache_bytes(model, HALF)
    rates = CallRates(model, cluster, first.axes)
    return InferenceCost(
        name,
        weight_bytes=HALF * parameter_count(model, first.axes),
        cache_bytes_per_prompt_token=of_prompt / len(text),
        cache_bytes_per_answer_token=cache_bytes(model, first.axes, 1, 0, HALF),
        dialogues={policy: list(map(rates.turn, found)) for policy, found in dialogues.items()},
    )


@dataclass(frozen=True)
class CallRates:
    """Seconds of a model's calls on a GPU. axes: of positions."""

    model: Model
    cluster: Cluster
    axes: int

    def turn(self, turn: Turn) -> TurnCost:
        prefill, per_token, limit = turn.prefill, None, None
        moved = self.moved(prefill)
        if turn.steps:
            ends = turn.step(1), turn.step(turn.steps)
            first, last = (self.seconds(call, math.inf) for call in ends)
            each = np.linspace(first, last, turn.steps)  # by the same amount from step to step
            per_token = float(each.max(axis=1).mean())
            limit = "compute" if each[-1, 0] > each[-1, 1] else "bandwidth"
            moved += sum(map(self.moved, ends)) * turn.steps // 2
        return TurnCost(
            first_token_seconds=max(self.seconds(prefill, max(prefill.keys, prefill.memory))),
            token_seconds=per_token,
            limit=limit,
            flops=flops.forward(self.model, turn.counts).total,
            moved_bytes=moved,
            cache_bytes=turn.cache_bytes(self.model, HALF),
            reused_tokens=turn.held,
        )

    def moved(self, call: Call) -> int:
        given = self.model, self.axes, call.counts, call.keys, call.memory
        return sum(memory_traffic(*given, HALF))

    def seconds(self, call: Call, row: float) -> tuple[float, float]:
        """Returns those of a call's FLOPs and those of its bytes. row: tokens on which the rate of attention
        depends; a single query only reads the cache, whatever its length."""
        gpu, share = self.cluster.gpu, self.cluster.constants.product
        work = flops.forward(self.model, call.counts)
        products = (work.total - work.attention) / (gpu.product * 1e12 * share)
        rates = Rates(self.cluster, Parallel(), OURS)
        attention = rates.attention(Work(attention=((work.attention, row),)))
        return products + attention, self.moved(call) / self.cluster.memory_rate
