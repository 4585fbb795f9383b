"""Costs of inference as a person and as a program read them."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np

from megaarch.errors import UserError
from megaarch.planner.hardware_rates import Cluster
from megaarch.planner.inference import InferenceCost, Lengths, TurnCost

SHOWN = 4  # turns of a dialogue that stand in its table
COLUMNS = 110
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
BYTES = {"GB": 1e9, "MB": 1e6, "KB": 1e3, "B": 1.0}
FLOPS = {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
Found = list[tuple[str, InferenceCost | UserError]]


def record(found: Found, gpu: str, cluster: Cluster, lengths: Lengths) -> dict[str, Any]:
    """What `plan-inference --json` prints. Bytes, seconds; of a batch."""

    def one(name: str, cost: InferenceCost | UserError) -> dict[str, Any]:
        if isinstance(cost, UserError):
            return {"name": name, "refused": str(cost)}
        return asdict(cost) | {"fits": cost.fits(cluster)}

    return {"gpu": gpu, **asdict(lengths), "models": [one(*each) for each in found]}


def tables(found: Found, gpu: str, cluster: Cluster, lengths: Lengths) -> str:
    """Both tables for a terminal."""
    costs = [cost for _, cost in found if isinstance(cost, InferenceCost)]
    width = max(7, *(len(cost.name) + 2 for cost in costs))  # of "model" at least
    lines = [
        f"one {gpu}, bf16, {cluster.room() / 1e9:.0f} GB for tensors; batch of {lengths.batch}, turns of "
        f"{lengths.prompt} tokens, answers of {lengths.answer}",
        "",
        *_first_turns(costs, width, cluster, lengths),
    ]
    if lengths.turns > 1:
        lines += ["", *_dialogues(costs, width, lengths)]
    refused: dict[str, list[str]] = {}
    for name, cost in found:
        if isinstance(cost, UserError):
            refused.setdefault(str(cost), []).append(name)
    for reason, names in refused.items():
        lines += ["", textwrap.fill(f"left out: {', '.join(names)}: {reason}", COLUMNS)]
    return "\n".join(lines)


def _first_turns(
    costs: list[InferenceCost], width: int, cluster: Cluster, lengths: Lengths
) -> list[str]:
    """The first turn, and the bytes of weights and of the fullest cache."""
    turns = [cost.dialogues["recompute"][0] for cost in costs]
    time, first = _column([turn.first_token_seconds for turn in turns], SECONDS)
    _, each = _column([turn.token_seconds for turn in turns], SECONDS, time)
    _, rates = _column([t.token_seconds and lengths.batch / t.token_seconds for t in turns])
    kept, of_prompt = _column([cost.cache_bytes_per_prompt_token for cost in costs], BYTES)
    _, of_answer = _column([cost.cache_bytes_per_answer_token for cost in costs], BYTES, kept)
    weight, weights = _column([cost.weight_bytes for cost in costs], BYTES)
    cache, caches = _column([cost.fullest_cache for cost in costs], BYTES)
    lines = [
        f"{'':<{width}}{f'{time} to first':>12}{f'{time} a token':>12}  {'':<10}{'tokens/s':>10}"
        f"{f'{kept} of cache a token':>22}{f'{weight} of':>9}{f'{cache} of':>9}",
        f"{'model':<{width}}{'token':>12}{'after it':>12}  {'limit':<10}{'of batch':>10}"
        f"{'of prompt':>12}{'of answer':>10}{'weights':>9}{'cache':>9}",
    ]
    for n, cost in enumerate(costs):
        lines.append(
            f"{cost.name:<{width}}{first[n]:>12}{each[n]:>12}  {turns[n].limit or '-':<10}"
            f"{rates[n]:>10}{of_prompt[n]:>12}{of_answer[n]:>10}{weights[n]:>9}{caches[n]:>9}"
            + ("" if cost.fits(cluster) else "  does not fit")
        )
    return lines


def _dialogues(costs: list[InferenceCost], width: int, lengths: Lengths) -> list[str]:
    """By turn: what its first token waits for, and FLOPs; policies that come to the same in one row."""
    # as many turns as there is room for, the first and the last among them
    shown = sorted({round(n) for n in np.linspace(0, lengths.turns - 1, SHOWN)})
    rows = [(cost.name, *policy) for cost in costs for policy in _apart(cost.dialogues)]
    time, waits = _column(
        [turns[n].first_token_seconds for *_, turns in rows for n in shown], SECONDS
    )
    work, flops = _column([turns[n].flops for *_, turns in rows for n in shown], FLOPS)
    _, sums = _column([sum(turn.flops for turn in turns) for *_, turns in rows], FLOPS, work)
    whole, seconds = _column(
        [sum(turn.seconds(lengths.answer) for turn in turns) for *_, turns in rows], SECONDS
    )
    numbers = "".join(f"{number + 1:>7}" for number in shown)
    lines = [
        f"{'':<{width + 18}}{f'{time} to first token, by turn':<{len(numbers)}}  {work}, by turn",
        f"{'model':<{width}}{'policy':<18}{numbers}  {numbers}{'all':>8}{f'{whole} in all':>10}",
    ]
    for n, (name, policy, _) in enumerate(rows):
        mine = slice(n * len(shown), (n + 1) * len(shown))
        lines.append(
            f"{name:<{width}}{policy:<18}"
            + "  ".join("".join(f"{x:>7}" for x in column[mine]) for column in (waits, flops))
            + f"{sums[n]:>8}{seconds[n]:>10}"
        )
    return lines


def _apart(dialogues: dict[str, list[TurnCost]]) -> list[tuple[str, list[TurnCost]]]:
    """Policies with their turns, those of equal turns together."""
    alike = groupby(dialogues, key=lambda policy: dialogues[policy])
    return [(", ".join(policies).replace("_", " "), turns) for turns, policies in alike]


def _column(
    values: Sequence[float | None], units: dict[str, float] | None = None, unit: str | None = None
) -> tuple[str, list[str]]:
    """Returns a column of figures and the unit that it is in, by default the one that suits its median;
    "-" for None."""
    units = units or {"": 1.0}
    known = [value for value in values if value is not None]
    if unit is None:
        middle = float(np.median(known)) if known else 0.0
        unit = next((name for name, size in units.items() if middle >= size), [*units][-1])
    return unit, ["-" if value is None else _digits(value / units[unit]) for value in values]


def _digits(value: float) -> str:
    for least, places in ((99.95, 0), (9.995, 1), (0.9995, 2)):
        if value >= least:
            return f"{value:,.{places}f}"
    return f"{value:.3f}"
