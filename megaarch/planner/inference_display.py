"""Costs of inference as a person and as a program read them."""

import textwrap
from dataclasses import asdict
from typing import Any

import numpy as np

from megaarch.errors import UserError
from megaarch.planner.inference import InferenceCost, Lengths, TurnCost
from megaarch.planner.rates import Cluster

SHOWN = 4  # turns of a dialogue that stand in its table
COLUMNS = 110
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
    usable = cluster.gpu.memory * cluster.constants.usable
    costs = [cost for _, cost in found if isinstance(cost, InferenceCost)]
    width = max(len(cost.name) for cost in costs) + 2
    lines = [
        f"one {gpu}, bf16, {usable:.0f} GB for tensors; batch of {lengths.batch}, turns of "
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
    lines = [
        f"{'':<{width}}{'ms to first':>12}{'ms a token':>12}  {'':<10}{'tokens/s':>9}"
        f"{'KB of cache a token':>22}{'GB of':>9}{'GB of':>9}",
        f"{'model':<{width}}{'token':>12}{'after it':>12}  {'limit':<10}{'of batch':>9}"
        f"{'of prompt':>12}{'of answer':>10}{'weights':>9}{'cache':>9}",
    ]
    for cost in costs:
        turn = cost.dialogues["recompute"][0]
        each, rate = "-", "-"
        if turn.token_seconds is not None:
            each, rate = (
                _digits(1e3 * turn.token_seconds),
                _digits(lengths.batch / turn.token_seconds),
            )
        lines.append(
            f"{cost.name:<{width}}{_digits(1e3 * turn.first_token_seconds):>12}{each:>12}  "
            f"{turn.limit or '-':<10}{rate:>9}{_digits(cost.cache_bytes_per_prompt_token / 1e3):>12}"
            f"{_digits(cost.cache_bytes_per_answer_token / 1e3):>10}"
            f"{_digits(cost.weight_bytes / 1e9):>9}{_digits(cost.fullest_cache / 1e9):>9}"
            + ("" if cost.fits(cluster) else "  does not fit")
        )
    return lines


def _dialogues(costs: list[InferenceCost], width: int, lengths: Lengths) -> list[str]:
    """By turn: what its first token waits for, and FLOPs; policies that come to the same in one row."""
    shown = _shown(lengths.turns)
    numbers = "".join(f"{number + 1:>7}" for number in shown)
    lines = [
        f"{'':<{width + 18}}{'ms to first token, by turn':<{len(numbers)}}  TFLOP, by turn",
        f"{'model':<{width}}{'policy':<18}{numbers}  {numbers}{'all':>8}{'seconds':>9}",
    ]
    for cost in costs:
        for policy, turns in _apart(cost.dialogues):
            waits = [_digits(1e3 * turns[n].first_token_seconds) for n in shown]
            work = [_digits(turns[n].flops / 1e12) for n in shown]
            total = _digits(sum(turn.flops for turn in turns) / 1e12)
            seconds = sum(
                turn.first_token_seconds + (lengths.answer - 1) * (turn.token_seconds or 0.0)
                for turn in turns
            )
            lines.append(
                f"{cost.name:<{width}}{policy:<18}"
                + "".join(f"{wait:>7}" for wait in waits)
                + "  "
                + "".join(f"{flops:>7}" for flops in work)
                + f"{total:>8}{_digits(seconds):>9}"
            )
    return lines


def _apart(dialogues: dict[str, list[TurnCost]]) -> list[tuple[str, list[TurnCost]]]:
    """Policies with their turns, those of equal turns together."""
    found: list[tuple[str, list[TurnCost]]] = []
    for policy, turns in dialogues.items():
        name = policy.replace("_", " ")
        if found and found[-1][1] == turns:
            found[-1] = (f"{found[-1][0]}, {name}", turns)
        else:
            found.append((name, turns))
    return found


def _shown(turns: int) -> list[int]:
    """Returns the numbers of turns that a table has room for, the first and the last among them."""
    return sorted({round(n) for n in np.linspace(0, turns - 1, SHOWN)})


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
