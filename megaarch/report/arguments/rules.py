"""The rules by which a study answers the seven arguments for decoders: docs/why.md, "Rules".

Each rule is a function of scores, and was written before any cell of the committed study was finished. A difference
counts where it is more than chance explains, corrected for the comparisons of its argument (Holm). An argument holds
here only where all that it claims was found, and does not where the opposite of a part of it was.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megaarch.report.notation import fixed, listed, percent
from megaarch.report.yardsticks import Score, told_apart

Answer = Literal["holds here", "does not hold here", "cannot be told"]
HOLDS: Answer = "holds here"
FAILS: Answer = "does not hold here"
UNKNOWN: Answer = "cannot be told"
Scores = Mapping[str, Score]  # by the name that a reader sees

FAR_BELOW = 0.5  # of chance: a place is told if a probe misses it by less
DEARER = 1.1  # what a dialogue costs more, at least, for the cache to be an argument
FULL_SPEED = 0.9  # of causal throughput, at least, for a mask to count as served


@dataclass(frozen=True)
class Verdict:
    """found: what was found here, one sentence."""

    answer: Answer
    found: str


@dataclass(frozen=True)
class Standing:
    """How one score stands to others: the names that it is better than, worse than, not told from, and those
    that were not measured."""

    others: Scores
    better: list[str]
    worse: list[str]
    tied: list[str]
    missing: list[str]

    @property
    def answer(self) -> Answer:
        if self.worse:
            return FAILS
        return HOLDS if self.better and not self.tied + self.missing else UNKNOWN


def standing(scores: Scores, claimed: str, higher_is_better: bool) -> Standing:
    """Compares the score of this name with each of the others."""
    others = {name: score for name, score in scores.items() if name != claimed}
    pairs = {name: (scores[claimed], other) for name, other in others.items()}
    return of_pairs(pairs, higher_is_better)


def of_pairs(pairs: Mapping[str, tuple[Score, Score]], higher_is_better: bool) -> Standing:
    """Compares by pairs, each of the claimed score at the conditions of the other, and the other."""
    differs = told_apart(list(pairs.values()))
    found = Standing({name: other for name, (_, other) in pairs.items()}, [], [], [], [])
    for (name, (claimed, other)), apart in zip(pairs.items(), differs, strict=True):
        if claimed.value is None or other.value is None:
            found.missing.append(name)
        elif not apart:
            found.tied.append(name)
        elif (claimed.value > other.value) == higher_is_better:
            found.better.append(name)
        else:
            found.worse.append(name)
    return found


def generalization(raw: Scores, decoder: str, chance: float, prior: float | None = None) -> Verdict:
    """1. "Decoders generalize better without examples": accuracy on tasks, before any finetuning.

    raw: the tasks' mean accuracy of cells that see a prompt whole. decoder: the causal one among them.
    chance: of guessing. Where no cell is above it nothing can be told. prior: of always giving a task's commonest
    answer, which is said and decides nothing.
    """
    able = any(score.interval and score.interval[0] > chance for score in raw.values())
    value = f"{decoder} is right in {percent(raw[decoder].value)} of the tasks' questions"
    if prior is not None:
        value += f", where a task's commonest answer is right in {percent(prior)}"
    if not able:
        return Verdict(UNKNOWN, f"{value}: no cell is above guessing ({percent(chance)}).")
    found = standing(raw, decoder, higher_is_better=True)
    return Verdict(found.answer, f"{value}, {_against(found, 'more', 'less')}.")


def rank(pairs: Mapping[str, tuple[Score, Score]], swapped: Scores) -> Verdict:
    """2. "Bidirectional attention degenerates to low rank, causal attention does not": effective rank of
    trained attention, as a share of the row.

    pairs: by bidirectional model, the rank of causal attention over as many tokens, and its own. swapped: what
    the same weights lose in effective rank under a mask that sees both ways instead of a causal one; positive
    where the mask by itself costs rank.
    """
    found = of_pairs(pairs, higher_is_better=True)
    loses = [name for name, score in swapped.items() if score.interval and score.interval[0] > 0]
    gains = [name for name, score in swapped.items() if score.interval and score.interval[1] < 0]
    answer = found.answer
    if gains:
        answer = FAILS
    elif answer == HOLDS and not (loses and len(loses) == len(swapped)):
        answer = UNKNOWN
    named = {
        n: f"{n} ({percent(c.value)} against {percent(o.value)})" for n, (c, o) in pairs.items()
    }
    parts = {
        "more than that of": found.better,
        "less than that of": found.worse,
        "not distinguishable from that of": found.tied,
    }
    said = [
        f"{words} {listed([named[n] for n in names])}" for words, names in parts.items() if names
    ]
    if found.missing:
        said.append(f"not measured against {listed(found.missing)}")
    words = f"causal attention's effective rank, as a share of the tokens, is {', '.join(said)}"
    for names, change in ((gains, "gain"), (loses, "lose")):
        if names:
            own = [f"{n} ({percent(abs(swapped[n].value or 0.0))})" for n in names]
            words += f"; seeing both ways in place of causally, the weights of {listed(own)} {change} rank"
    return Verdict(answer, f"{words[0].upper()}{words[1:]}.")


def difficulty(nats: Scores, states: Scores, decoder: str) -> Verdict:
    """3. "Predicting the next token is the harder task, from which more is learned": what a target costs, and
    how much a probe reads off frozen states. Both by cell, of which `decoder` is trained on full_lm."""
    harder = standing(nats, decoder, higher_is_better=True)
    learned = standing(states, decoder, higher_is_better=True)
    answers = {harder.answer, learned.answer}
    answer = FAILS if FAILS in answers else HOLDS if answers == {HOLDS} else UNKNOWN
    return Verdict(
        answer,
        f"The loss of {decoder} is {fixed(nats[decoder].value)} nats a target, {_against(harder, 'more', 'less')}; a "
        f"linear probe of its frozen states is right in {percent(states[decoder].value)} of questions, "
        f"{_against(learned, 'more', 'less')}.",
    )


def in_context(causal: Score, others: Scores) -> Verdict:
    """4. "A decoder learns from examples in its context more directly": the error of in-context regression
    behind all examples, over that of least squares."""
    found = of_pairs({n: (causal, other) for n, other in others.items()}, higher_is_better=False)
    seeds = f" ({listed([fixed(s) for s in causal.by_seed])} by seed)" if causal.by_seed else ""
    return Verdict(
        found.answer,
        f"Behind all examples a causal model's squared error is {fixed(causal.value)}{seeds}, "
        f"{_against(found, 'less', 'more', values=True)}.",
    )


def position(
    causal: Score, bidirectional: Scores, cost: Scores, decoder: str, last: Score | None = None
) -> Verdict:
    """5. "Causal attention tells positions by itself": models without positions.

    causal, bidirectional: the distance between a token's place and what a probe reads off the second layer, as
    a share of what telling nothing gives. cost: bits per byte that a model loses without positions, by
    architecture; `decoder` is the causal one. last: as `causal`, of its last layer, which is said and decides nothing.
    """
    low, high = causal.interval or (0.0, math.inf)  # without one, nothing is known
    blind = [
        name
        for name, score in bidirectional.items()
        if score.interval and score.interval[0] >= FAR_BELOW and score.interval[1] >= 1
    ]
    cheaper = standing(cost, decoder, higher_is_better=False)
    if low >= FAR_BELOW or cheaper.answer == FAILS:
        answer = FAILS
    elif high < FAR_BELOW and blind == list(bidirectional) != [] and cheaper.answer == HOLDS:
        answer = HOLDS
    else:
        answer = UNKNOWN
    rest = [
        f"{'an unknown share' if s.value is None else percent(s.value)} in {n}"
        for n, s in bidirectional.items()
    ]
    deepest = f" ({percent(last.value)} in its last layer)" if last else ""
    both_ways = f", and by {listed(rest)}" if rest else ""
    return Verdict(
        answer,
        f"Without positions, a probe of the second layer misses a token's place by {percent(causal.value)} of what "
        f"guessing does in {decoder}{deepest}{both_ways}. Leaving positions out costs {decoder} "
        f"{fixed(cost[decoder].value)} bits per byte, "
        f"{_against(cheaper, 'less', 'more', values=True)}.",
    )


def caches(flops: Mapping[str, float], decoder: str) -> Verdict:
    """6. "A decoder keeps its cache over the turns of a dialogue": exact FLOPs of one, under the cheapest
    policy that the mask of training allows."""
    ratios = {name: cost / flops[decoder] for name, cost in flops.items() if name != decoder}
    if not ratios:
        return Verdict(UNKNOWN, "There is no other model that generates.")
    least = min(ratios, key=ratios.__getitem__)
    most = max(ratios, key=ratios.__getitem__)
    answer = HOLDS if ratios[least] >= DEARER else FAILS if ratios[least] <= 1 else UNKNOWN
    ends = f"{ratios[least]:.2f} times as many FLOPs for {least}"
    if most != least:
        ends += f" and {ratios[most]:.2f} times for {most}"
    return Verdict(answer, f"The dialogue takes {ends} as for {decoder}.")


def tools(ours: Mapping[str, float], others: Mapping[str, float]) -> Verdict:
    """7. "Tools serve causal masks best": throughput of other masks over causal's at equal area.

    ours: least over masks of each kernel here. others: of each other implementation at hand. It holds where all
    others fall behind and one of ours does not: then the mask is not what costs.
    """
    slow = [name for name, ratio in others.items() if ratio < FULL_SPEED]
    served = [name for name, ratio in ours.items() if ratio >= FULL_SPEED]
    if others and not slow:
        answer = FAILS
    elif slow and len(slow) == len(others) and served:
        answer = HOLDS
    else:
        answer = UNKNOWN

    ratios = listed([f"{ratio:.2f} with {name}" for name, ratio in {**ours, **others}.items()])
    return Verdict(
        answer,
        "For each pair of tokens that see each other, the slowest mask that is not causal runs at this share of causal "
        f"throughput: {ratios}.",
    )


def _against(found: Standing, better: str, worse: str, values: bool = False) -> str:
    """Says how a score stands, e.g. "more than a and b, and not distinguishable from c". values: with each of the
    others'."""
    others = found.others

    def named(of: list[str]) -> str:
        return listed([f"{name} ({fixed(others[name].value)})" if values else name for name in of])

    def names(of: list[str], word: str) -> str:
        return f"{word} than {named(of)}"

    if not values and others and len(found.better) == len(others):
        return f"{better} than every other" if len(others) > 1 else names(found.better, better)
    parts = [names(found.better, better)] if found.better else []
    parts += [names(found.worse, worse)] if found.worse else []
    if found.tied:
        every = len(found.tied) == len(others) > 1 and not values
        rest = "any other" if every else named(found.tied)
        parts.append(f"not distinguishable from {rest}")
    if found.missing:
        parts.append(f"not measured against {listed(found.missing)}")
    return ", ".join(parts) or "with nothing to compare it with"
