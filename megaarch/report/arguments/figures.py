"""The figures of the seven arguments, each drawn from what its rule is given. Names: argument-NAME."""

import math
from collections.abc import Mapping, Sequence

from megaarch.probes.attention_rank import Block
from megaarch.probes.dialogue import TURNS
from megaarch.probes.estimate import Estimate
from megaarch.probes.in_context_regression import ARCHITECTURES, Regressed
from megaarch.probes.mask_speed import Throughput
from megaarch.probes.position import Stream
from megaarch.report import charts
from megaarch.report.arguments.rules import FAR_BELOW
from megaarch.report.axes import Looks
from megaarch.report.charts import Entry, Point, lines
from megaarch.report.notation import percent, spelled
from megaarch.report.style import Look, Panel
from megaarch.report.yardsticks import Score

MARK = "*"
SHORT = {  # masks as labels of rows
    "prefix of a quarter": "prefix \u00bc",
    "prefix of a half": "prefix \u00bd",
    "prefix of three quarters": "prefix \u00be",
    "bidirectional": "both ways",
}


def points(
    estimates: Sequence[Estimate], places: Sequence[float], most: float = math.inf
) -> list[Point]:
    """Returns points of a line, of what has a value, in intervals that end at 0 and `most`."""
    return [
        Point(x, e.value, max(e.ends[0], 0.0), min(e.ends[1], most))
        for x, e in zip(places, estimates, strict=True)
        if e.value is not None
    ]


def generalization(
    accuracies: Mapping[str, Score],
    pseudo: Sequence[str],
    chance: float,
    prior: float | None,
    look: Looks,
) -> Panel:
    """pseudo: cells whose accuracies are of pseudo-likelihoods. prior: of always giving a task's commonest answer;
    None: it is not known of every task."""
    panel = charts.dots(
        "argument-generalization",
        "Tasks, before and after finetuning",
        charts.entries(accuracies, dict.fromkeys(pseudo, MARK)),
        look,
        "mean accuracy of the tasks",
        ("guessing", chance) if prior is None else ("commonest answer", prior),
    )
    panel.caption = (
        "The answer is the choice that a model finds likeliest. Hollow: finetuned on other items of the tasks, with more "
        "compute."
    )
    if prior is not None:
        panel.caption += f" Guessing is right in {percent(chance)}."
    if set(pseudo) & set(accuracies):
        panel.caption += f" {MARK} Each token given those on both of its sides: not compared."
    return panel


def rank(blocks: Mapping[str, Block], causal: Block, half: Block, look: Looks) -> Panel:
    """blocks: those that are compared, by cell. causal: of the decoder. half: the same over as many tokens as a
    prefix has."""
    panel = lines(
        "argument-rank",
        "Effective rank of attention, by layer",
        {
            label: points(
                [layer.matrix.effective_rank for layer in block.layers],
                range(1, len(block.layers) + 1),
                most=1.0,
            )
            for label, block in blocks.items()
        },
        look,
        "layer",
        "effective rank, share of the tokens",
    )
    panel.caption = (
        "How many directions attention uses (exp of the entropy of a matrix's singular values), as a share of its "
        "tokens; means over heads and held-out rows. Compared is attention among tokens that see each other both ways: "
        "a prefix decoder's prefix, an encoder-decoder's encoder; and the causal decoder's over as many tokens."
    )
    for kind, control, over in (
        ("Random attention as sharp as the causal decoder's", causal.matched, causal.queries),
        ("Equal attention to all that is seen", half.uniform, half.queries),
    ):
        if control:
            one, both = (
                percent(control[m].matrix.effective_rank.value) for m in ("causal", "full")
            )
            panel.caption += f" {kind} has {one} under a causal mask and {both} seeing both ways ({over} tokens)."
    return panel


def difficulty(
    nats: Mapping[str, Score], states: Mapping[str, Score], chance: float, look: Looks
) -> tuple[Panel, Panel]:
    """nats: what a target costs. states: the accuracy of linear probes."""
    cost = charts.dots(
        "argument-difficulty-cost",
        "What a target costs",
        charts.entries(nats, {}),
        look,
        "nats a target",
        None,
    )
    cost.caption = (
        "Held-out loss of each on its own training task, of which they have seen unequal numbers of targets (below, "
        "under Targets). A nat is 1.44 bits."
    )
    learned = charts.dots(
        "argument-difficulty",
        "What a linear probe reads off frozen states",
        charts.entries(states, {}),
        look,
        "mean accuracy of the tasks",
        ("chance", chance),
    )
    learned.caption = (
        "A linear probe is trained on the mean hidden state of a text, and the model stays as it is; held-out "
        "items."
    )
    return cost, learned


def in_context(found: Regressed, colours: Mapping[str, str]) -> Panel:
    """The error of each learner by the number of examples, and of the causal decoder by seed. colours: of a study's
    architectures."""
    errors = {spelled(name): one.error for name, one in found.learners.items()}
    look = {
        spelled(name): Look(colours.get(name, "muted"), "o", "-" if name in ARCHITECTURES else ":")
        for name in found.learners
    }
    seeds = by_seed(errors["causal decoder"])
    panel = lines(
        "argument-context",
        "In-context linear regression",
        {
            name: points(list(error.values()), [int(n) for n in error])
            for name, error in errors.items()
        },
        look,
        "examples in the context",
        "squared error, 1 without examples",
        logarithmic=True,
        thin={"causal decoder": seeds},
    )
    if len(seeds) > 1:
        panel.caption = (
            f"Small models trained for this alone, means over {len(seeds)} seeds; thin: each seed of the causal decoder. "
            f"Least squares peaks where examples are as many as dimensions ({found.settings.dimensions})."
        )
    return panel


def by_seed(error: Mapping[str, Estimate]) -> list[list[tuple[float, float]]]:
    """Returns a curve of each seed, at the numbers of examples at which all seeds have a value; none where there
    is one seed."""
    number = max(len(estimate.seeds) for estimate in error.values())
    whole = {int(n): e.seeds for n, e in error.items() if len(e.seeds) == number}
    return [list(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]


def position(streams: Mapping[str, Stream], look: Looks) -> Panel:
    """streams: of models without positions, the one in which a probe reads places."""
    panel = lines(
        "argument-position",
        "Places read off states, without positions",
        {
            label: points([layer.of_chance for layer in s.layers], range(len(s.layers)))
            for label, s in streams.items()
        },
        look,
        "layer (0: the embedding)",
        "error in a token's place, share of guessing's",
        ("the rule asks for less than", FAR_BELOW),
    )
    panel.caption = "Of an encoder-decoder, its encoder is shown. 100%: the states tell nothing."
    return panel


def caches(turns: Mapping[str, Sequence[int]], said: int, row: int, look: Looks) -> Panel:
    """turns: FLOPs of each. said: tokens of a turn. row: tokens of a row of training; 0: not known."""
    series = {
        label: [Point(i, f / 1e9, f / 1e9, f / 1e9) for i, f in enumerate(flops, 1)]
        for label, flops in turns.items()
    }
    panel = lines(
        "argument-caches", "What a turn of a dialogue costs", series, look, "turn", "GFLOPs"
    )
    panel.caption = (
        "Counted, not measured. A cache serves on where no new token changes what earlier ones see; else the dialogue so "
        f"far runs anew at every turn. Turns and answers of {said} tokens each"
    )
    if 2 * TURNS * said > row > 0:
        panel.caption += f": together more than the rows of {row} that the models were trained on"
    panel.caption += ". An encoder does not generate."
    return panel


def tools(found: Throughput) -> Panel:
    """The throughput of each kernel under each mask."""
    look = {
        name: Look("ink" if name in found.ours else "muted", "o", "-") for name in found.of_kernels
    }
    rows = {
        f"{name}: {SHORT.get(mask, mask)}": estimate
        for name, ratios in found.of_kernels.items()
        for mask, estimate in ratios.items()
    }
    panel = charts.dots(
        "argument-tools",
        "Throughput of other masks over causal's",
        [Entry(n, e.value, e.interval) for n, e in rows.items() if e.value is not None],
        {row: look[row.partition(": ")[0]] for row in rows},
        "over causal throughput",
        ("causal", 1.0),
    )
    panel.caption = (
        "Pairs of tokens that see each other in a second, over those of the causal mask. Dense mask: torch's attention "
        "with its causal flag, or a table of these pairs for prefixes; seeing both ways needs neither. Rows of "
        f"{found.length:,} tokens"
    )
    if found.device == "cpu":
        panel.caption += (
            " on a CPU, where what torch's causal flag skips depends on the row: a GPU may differ"
        )
    panel.caption += "."
    return panel
