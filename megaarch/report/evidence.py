"""What a study and its probes say on each argument: the scores that its rule is given, and a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import matplotlib

from megaarch.probes import catalogue
from megaarch.probes.attention_rank import Block, Ranks
from megaarch.probes.catalogue import Probed
from megaarch.probes.dialogue import TURNS
from megaarch.probes.difficulty import Difficulty
from megaarch.probes.estimate import Estimate
from megaarch.probes.mask_speed import Throughput
from megaarch.probes.position import Positions, Stream
from megaarch.probes.regression import Regressed
from megaarch.report import plots, verdicts
from megaarch.report.inference import cheapest, dialogues
from megaarch.report.judged_cells import Compared
from megaarch.report.notation import percent
from megaarch.report.plots import Entry, Point, lines
from megaarch.report.style import RC, Look, Panel
from megaarch.report.verdicts import Verdict
from megaarch.report.yardsticks import TASKS, Score, chance_of
from megaarch.study.results import Results

SECOND = 2  # the layer whose states tell places, counted from the embedding (0)
MARK = "*"
SHORT = {  # masks as labels of rows
    "prefix of a quarter": "prefix \u00bc",
    "prefix of a half": "prefix \u00bd",
    "prefix of three quarters": "prefix \u00be",
    "bidirectional": "both ways",
}
# of models that are no cells: the preset whose colour they have
DRAWN_AS = {"causal_decoder": "gpt", "prefix_decoder": "prefix_lm", "encoder_decoder": "t5"}


@dataclass(frozen=True)
class Argument:
    """An argument as the report shows it. verdict: None, with no panels, where it was not measured."""

    number: int
    title: str
    claim: str
    probe: str
    verdict: Verdict | None = None
    panels: tuple[Panel, ...] = ()


ARGUMENTS = (
    Argument(1, "Generalization", "Decoders generalize better without examples.", "compare"),
    Argument(2, "Rank", "Bidirectional attention degenerates to low rank.", "rank"),
    Argument(
        3, "Difficulty", "Predicting the next token is harder, and teaches more.", "difficulty"
    ),
    Argument(4, "Context", "Decoders learn more directly from examples in context.", "regression"),
    Argument(5, "Position", "Causal attention tells positions by itself.", "position"),
    Argument(6, "Caches", "A decoder keeps its cache over the turns of a dialogue.", "dialogue"),
    Argument(7, "Tools", "Tools serve causal masks best.", "masks"),
)


def evidence(results: Results, probed: Mapping[str, Probed]) -> list[Argument]:
    """Returns the seven arguments, each with its verdict and figure where the study has what its rule asks for.

    None where no probe has run.
    """
    if not probed:
        return []
    study = Compared.of(results)
    if study is None:
        return list(ARGUMENTS)
    found = []
    with matplotlib.rc_context(RC):
        for argument, make in zip(ARGUMENTS, MAKERS, strict=True):
            made = make(study, probed)
            verdict, *panels = made or (None,)
            found.append(replace(argument, verdict=verdict, panels=tuple(panels)))
    return found


Made = tuple[Verdict, Panel] | tuple[Verdict, Panel, Panel] | None


def as_score(estimate: Estimate) -> Score:
    """An estimate as the panel's statistics take it."""
    return Score(estimate.value, estimate.interval, None, list(estimate.seeds))


def entries(scores: Mapping[str, Score], marked: Sequence[str] = ()) -> list[Entry]:
    """Rows of dots, the largest first. marked: names with a mark behind them."""
    rows = [
        Entry(n, s.value, s.interval, MARK if n in marked else "")
        for n, s in scores.items()
        if s.value is not None
    ]
    return sorted(rows, key=lambda row: -row.value)


def points(
    estimates: Sequence[Estimate], places: Sequence[float], most: float = math.inf
) -> list[Point]:
    """Points of a line, of what has a value, in intervals that end at 0 and `most`."""
    return [
        Point(x, e.value, max(e.ends[0], 0.0), min(e.ends[1], most))
        for x, e in zip(places, estimates, strict=True)
        if e.value is not None
    ]


def _generalization(study: Compared, probed: Mapping[str, Probed]) -> Made:
    every = {c.label: c.heldout.score(TASKS) for c in study.cells if c not in study.without}
    raw = {
        c.label: every[c.label]
        for c in study.raw
        if c is study.decoder or (c.heldout.comparable and not study.causal(c.label))
    }
    chance = chance_of(study.decoder.heldout)
    if raw[study.decoder.label].value is None or chance is None:
        return None
    verdict = verdicts.generalization(raw, study.decoder.label, chance)
    panel = plots.dots(
        "argument-generalization",
        "Tasks, before and after finetuning",
        entries(every, [c.label for c in study.cells if not c.heldout.comparable]),
        study.look,
        "mean accuracy of the tasks",
        ("chance", chance),
        always=True,
    )
    panel.caption = "By rank classification. Finetuned cells trained on other items of tasks, with more compute."
    ranked = [t for t in study.decoder.heldout.tasks.values() if t.chance is not None]
    priors = [t.prior for t in ranked if t.prior is not None]
    if len(priors) == len(ranked):
        panel.caption += f" Always giving a task's commonest answer is right in {percent(sum(priors) / len(priors))}."
    if any(c.label in every and not c.heldout.comparable for c in study.cells):
        panel.caption += f" {MARK} By a pseudo-likelihood: not compared."
    return verdict, panel


def _rank(study: Compared, probed: Mapping[str, Probed]) -> Made:
    if "rank" not in probed:
        return None
    ranks: dict[str, Ranks]
    ranks, missing = study.probed(probed["rank"], study.raw)
    mine = ranks.pop(study.decoder.label, None)
    if mine is None:
        return None
    causal = mine.blocks["decoder"]
    pairs, drawn = {}, {}
    for label, record in ranks.items():
        name = next((n for n in ("encoder", "decoder.prefix") if n in record.blocks), None)
        if name is None or study.causal(label):
            continue
        block = record.blocks[name]
        alike = causal if block.queries == causal.queries else mine.blocks["decoder.prefix"]
        drawn.setdefault(study.decoder.label, alike)
        effective = [b.trained.matrix.effective_rank for b in (alike, block)]
        pairs[label] = (as_score(effective[0]), as_score(effective[1]))
        drawn[label] = block
    every = {study.decoder.label: mine} | ranks
    swapped = {
        label: as_score(block.lost_by_seeing_ahead)
        for label, record in every.items()
        for name, block in record.blocks.items()
        if block.lost_by_seeing_ahead is not None
        and name in ("encoder", "decoder")
        and label in drawn
        and (name == "encoder" or "encoder" not in record.blocks)
    }
    if not pairs:
        return None
    unknown = {label: Score(None) for label in missing if not study.causal(label)}
    pairs |= {label: (score, score) for label, score in unknown.items()}
    panel = lines(
        "argument-rank",
        "Effective rank of attention, by layer",
        {
            label: points(
                [layer.matrix.effective_rank for layer in block.layers],
                range(1, len(block.layers) + 1),
                most=1.0,
            )
            for label, block in drawn.items()
        },
        study.look,
        "layer",
        "effective rank, share of the row",
    )
    panel.caption = _rank_caption(causal, mine.blocks.get("decoder.prefix", causal))
    return verdicts.rank(pairs, swapped | unknown), panel


def _rank_caption(causal: Block, half: Block) -> str:
    """Says what is drawn, and what the controls give. half: the causal block over as many tokens as a prefix has."""
    caption = (
        "How many directions a matrix of attention uses (exp of the entropy of its singular values), as a share of "
        "its tokens; means over heads and held-out rows. Of the causal decoder as many tokens as are seen both "
        "ways, of a prefix decoder its prefix, of an encoder-decoder its encoder."
    )
    for kind, control, over in (
        ("Random attention as sharp as the causal decoder's", causal.matched, "whole rows"),
        ("Attention to all that is seen alike", half.uniform, f"{half.queries} tokens"),
    ):
        if control:
            one, both = (
                percent(control[m].matrix.effective_rank.value) for m in ("causal", "full")
            )
            caption += (
                f" {kind} has {one} under a causal mask and {both} seeing both ways, over {over}."
            )
    return caption


def _difficulty(study: Compared, probed: Mapping[str, Probed]) -> Made:
    if "difficulty" not in probed:
        return None
    records: dict[str, Difficulty]
    records, _ = study.probed(probed["difficulty"], study.raw)
    whole = {n: r for n, r in records.items() if r.nats_per_target and r.linear}
    if study.decoder.label not in whole or len(whole) < 2:
        return None
    unknown = {cell.label: Score(None) for cell in study.raw}
    nats = unknown | {n: as_score(r.nats_per_target) for n, r in whole.items() if r.nats_per_target}
    states = unknown | {n: as_score(r.linear) for n, r in whole.items() if r.linear}
    chances = [r.chance for r in whole[study.decoder.label].representation.values()]
    panel = plots.dots(
        "argument-difficulty",
        "What a linear probe reads off frozen states",
        entries(states),
        study.look,
        "mean accuracy of the tasks",
        ("chance", sum(chances) / len(chances)),
        always=True,
    )
    panel.caption = "A probe is trained on the mean state of a text in one layer, and the model is not; held-out items."
    cost = plots.dots(
        "argument-difficulty-cost",
        "What a target costs",
        entries(nats),
        study.look,
        "nats a target",
        None,
    )
    cost.caption = (
        "Each on its own training task, of which cells have seen unequal numbers of targets."
    )
    return verdicts.difficulty(nats, states, study.decoder.label), cost, panel


def _in_context(study: Compared, probed: Mapping[str, Probed]) -> Made:
    if "regression" not in probed:
        return None
    found: Regressed = probed["regression"].cells[catalogue.ALONE]
    errors = {name: learner.error for name, learner in found.learners.items()}
    if "causal_decoder" not in errors:
        return None
    last = max(errors["causal_decoder"], key=int)
    scores = {name: as_score(error[last]) for name, error in errors.items() if name in DRAWN_AS}
    causal = scores.pop("causal_decoder")
    words = {name: name.replace("_", " ") for name in errors}
    look = {
        words[name]: Look(DRAWN_AS.get(name, "muted"), "o", "-" if name in DRAWN_AS else ":")
        for name in errors
    }
    panel = lines(
        "argument-context",
        "In-context linear regression",
        {
            words[name]: points(list(error.values()), [int(n) for n in error])
            for name, error in errors.items()
        },
        look,
        "examples in the context",
        "squared error, 1 without examples",
        logarithmic=True,
        thin={words["causal_decoder"]: _by_seed(errors["causal_decoder"])},
    )
    number = len(causal.by_seed)
    if number > 1:
        panel.caption = (
            f"Means over {number} seeds; thin, each seed of the causal decoder. Least squares peaks where examples are as "
            f"many as dimensions ({found.settings.dimensions})."
        )
    others = {words[name]: score for name, score in scores.items()}
    return verdicts.in_context(causal, others), panel


def _by_seed(error: Mapping[str, Estimate]) -> list[list[tuple[float, float]]]:
    """Returns a curve of each seed; none where there is one."""
    places = [int(n) for n in error]
    seeds = zip(*(estimate.seeds for estimate in error.values()), strict=True)
    return [list(zip(places, values, strict=True)) for values in seeds]


def _position(study: Compared, probed: Mapping[str, Probed]) -> Made:
    if "position" not in probed:
        return None
    records: dict[str, Positions]
    records, missing = study.probed(probed["position"], study.without)
    streams: dict[str, Stream] = {n: next(iter(r.streams.values())) for n, r in records.items()}
    cost = {c.label: study.loss_without_positions(c) for c in study.without if c.heldout.comparable}
    mine = next((c.label for c in study.without if study.pair(c) is study.decoder), None)
    if mine not in streams or cost[mine].value is None or len(cost) < 2:
        return None
    second = {label: Score(None) for label in missing} | {
        label: as_score(s.layers[SECOND].of_chance) if len(s.layers) > SECOND else Score(None)
        for label, s in streams.items()
    }
    if second[mine].value is None:
        return None
    both_ways = {n: s for n, s in second.items() if not study.causal(n)}
    panel = lines(
        "argument-position",
        "Places read off states, without positions",
        {
            label: points([layer.of_chance for layer in s.layers], range(len(s.layers)))
            for label, s in streams.items()
        },
        study.look,
        "layer (0: the embedding)",
        "error in a token's place, share of guessing's",
    )
    panel.caption = "Of an encoder-decoder its encoder."
    last = as_score(streams[mine].layers[-1].of_chance)
    return verdicts.position(second[mine], both_ways, cost, mine, last), panel


def _caches(study: Compared, probed: Mapping[str, Probed]) -> Made:
    able = dialogues(probed, study.raw)
    if study.decoder.label not in able:
        return None
    turns = {label: cheapest(dialogue) for label, dialogue in able.items()}
    architecture = {cell.label: cell.architecture for cell in study.raw}
    one: dict[str, str] = {}  # the cheapest cell of each architecture, and the decoder for its own
    for label in sorted(turns, key=lambda label: -sum(turns[label])):
        one[architecture[label]] = label
    one["causal_decoder"] = study.decoder.label
    turns = {label: turns[label] for label in turns if label in one.values()}
    series = {}
    for label, flops in turns.items():
        series[label] = [Point(i, f / 1e9, f / 1e9, f / 1e9) for i, f in enumerate(flops, 1)]
    panel = lines(
        "argument-caches", "What a turn of a dialogue costs", series, study.look, "turn", "GFLOPs"
    )
    length = study.decoder.settings.get("model", {}).get("sequence_length", 0)
    said = able[study.decoder.label].tokens
    if 2 * TURNS * said > length > 0:
        panel.caption = (
            f"Counted, not measured. Turns and answers of {said} tokens: the whole is longer than the rows of "
            f"{length} that the models were trained on."
        )
    return verdicts.caches(
        {label: sum(flops) for label, flops in turns.items()}, study.decoder.label
    ), panel


def _tools(study: Compared, probed: Mapping[str, Probed]) -> Made:
    if "masks" not in probed:
        return None
    found: Throughput = probed["masks"].cells[catalogue.ALONE]
    look = {
        name: Look("prefix_lm" if name in found.ours else "muted", "o", "-")
        for name in found.of_kernels
    }
    rows = {
        f"{name}: {SHORT.get(mask, mask)}": as_score(estimate)
        for name, ratios in found.of_kernels.items()
        for mask, estimate in ratios.items()
    }
    panel = plots.dots(
        "argument-tools",
        "Throughput of other masks over causal's",
        [Entry(n, s.value, s.interval, "") for n, s in rows.items() if s.value is not None],
        {row: look[row.partition(": ")[0]] for row in rows},
        "ratio at equal area",
        ("causal", 1.0),
        always=True,
    )
    if found.device == "cpu":
        panel.caption = (
            f"Rows of {found.length:,} tokens on a CPU, where how much torch's causal flag skips depends on the row: a GPU "
            "may differ."
        )
    return verdicts.tools(found.least(ours=True), found.least(ours=False)), panel


MAKERS = (_generalization, _rank, _difficulty, _in_context, _position, _caches, _tools)
