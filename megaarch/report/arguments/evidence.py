"""What a study and its probes say on each argument: the scores that its rule is given."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import matplotlib

from megaarch.probes import catalogue, in_context_regression
from megaarch.probes.attention_rank import Ranks
from megaarch.probes.catalogue import Probed
from megaarch.probes.difficulty import Difficulty
from megaarch.probes.estimate import Estimate
from megaarch.probes.in_context_regression import Regressed
from megaarch.probes.mask_speed import Throughput
from megaarch.probes.position import Positions, Stream
from megaarch.report.arguments import figures, rules
from megaarch.report.arguments.judged_cells import Compared
from megaarch.report.arguments.rules import Verdict
from megaarch.report.dialogue_costs import cheapest, dialogues
from megaarch.report.notation import spelled
from megaarch.report.style import RC, Panel
from megaarch.report.yardsticks import TASKS, Score, chance_of
from megaarch.study.results import Results

SECOND = 2  # the layer whose states tell places, counted from the embedding (0)


@dataclass(frozen=True)
class Argument:
    """An argument as the report shows it. rule: what ends "It holds where". verdict: None, with no panels, where it
    was not measured."""

    claim: str
    probe: str
    rule: str
    verdict: Verdict | None = None
    panels: tuple[Panel, ...] = ()

    @property
    def missing(self) -> str:
        """What it takes to measure it."""
        said = "Not measured on these runs, or this study has not the cells for it"
        if self.probe == "compare":
            return f"{said}."
        return f"{said}: run megaarch probe {self.probe} --study on its folder."


ARGUMENTS = (
    Argument(
        "Decoders generalize better without examples.",
        "compare",
        "the causal decoder answers more of the tasks' questions than every model that is not causal, before any "
        "finetuning; it does not where one of them answers more.",
    ),
    Argument(
        "Bidirectional attention degenerates to low rank.",
        "rank",
        "causal attention uses more directions than every attention that sees both ways, and the same weights lose "
        "some where they see both ways; it does not where one that sees both ways uses more, or weights gain some.",
    ),
    Argument(
        "Predicting the next token is harder, and teaches more.",
        "difficulty",
        "the causal decoder has a larger loss per target than every other training task gives, and a probe reads more "
        "off its states than off any other's; it does not where one other has a larger loss, or more is read off it.",
    ),
    Argument(
        "Decoders learn more directly from examples in context.",
        "regression",
        "a causal model errs less behind all examples than a prefix decoder and an encoder-decoder do; it does not "
        "where one of them errs less.",
    ),
    Argument(
        "Causal attention tells positions by itself.",
        "position",
        "a token's place is read off the second layer of a causal decoder without positions with less than half of "
        "guessing's error, and off no other model at all, and the decoder loses the least by having none; it does not "
        "where the error is half or more, or another model loses less.",
    ),
    Argument(
        "A decoder keeps its cache over the turns of a dialogue.",
        "dialogue",
        "the eight turns of a dialogue cost every other architecture that generates at least "
        f"{rules.DEARER:g} times the FLOPs; it does not where one costs no more.",
    ),
    Argument(
        "Tools serve causal masks best.",
        "masks",
        f"every other tool runs some mask at less than {rules.FULL_SPEED:g} of its causal throughput and a kernel here "
        "runs none so slowly, so that tools are slow and not masks; it does not where every other tool reaches "
        f"{rules.FULL_SPEED:g}.",
    ),
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
            made = make(study, probed) if argument.probe in {"compare", *probed} else None
            verdict, *panels = made or (None,)
            found.append(replace(argument, verdict=verdict, panels=tuple(panels)))
    return found


Made = tuple[Verdict, Panel] | tuple[Verdict, Panel, Panel] | None


def as_score(estimate: Estimate) -> Score:
    """An estimate as the panel's statistics take it."""
    return Score(estimate.value, estimate.interval, None, list(estimate.seeds))


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
    pseudo = [c.label for c in study.cells if not c.heldout.comparable]
    ranked = [t for t in study.decoder.heldout.tasks.values() if t.chance is not None]
    priors = [t.prior for t in ranked if t.prior is not None]
    prior = sum(priors) / len(priors) if len(priors) == len(ranked) else None
    panel = figures.generalization(every, pseudo, chance, prior, study.look)
    return rules.generalization(raw, study.decoder.label, chance, prior), panel


def _rank(study: Compared, probed: Mapping[str, Probed]) -> Made:
    ranks: dict[str, Ranks]
    ranks, missing = study.probed(probed["rank"], study.raw)
    mine = ranks.pop(study.decoder.label, None)
    if mine is None:
        return None
    causal = mine.blocks["decoder"]
    own = {
        name: as_score(block.trained.matrix.effective_rank) for name, block in mine.blocks.items()
    }
    pairs, drawn = {}, {}
    for label, record in ranks.items():
        name = next((n for n in ("encoder", "decoder.prefix") if n in record.blocks), None)
        if name is None or study.causal(label):
            continue
        block = record.blocks[name]
        alike = "decoder" if block.queries == causal.queries else "decoder.prefix"
        drawn.setdefault(study.decoder.label, mine.blocks[alike])
        pairs[label] = (own[alike], as_score(block.trained.matrix.effective_rank))
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
    half = mine.blocks.get("decoder.prefix", causal)
    panel = figures.rank(drawn, causal, half, study.look)
    return rules.rank(pairs, swapped | unknown), panel


def _difficulty(study: Compared, probed: Mapping[str, Probed]) -> Made:
    records: dict[str, Difficulty]
    records, _ = study.probed(probed["difficulty"], study.raw)
    whole = {n: r for n, r in records.items() if r.nats_per_target and r.linear}
    if study.decoder.label not in whole or len(whole) < 2:
        return None
    unknown = {cell.label: Score(None) for cell in study.raw}
    nats = unknown | {n: as_score(r.nats_per_target) for n, r in whole.items() if r.nats_per_target}
    states = unknown | {n: as_score(r.linear) for n, r in whole.items() if r.linear}
    chances = [r.chance for r in whole[study.decoder.label].representation.values()]
    panels = figures.difficulty(nats, states, sum(chances) / len(chances), study.look)
    return rules.difficulty(nats, states, study.decoder.label), *panels


def _in_context(study: Compared, probed: Mapping[str, Probed]) -> Made:
    found: Regressed = probed["regression"].cells[catalogue.ALONE]
    errors = {name: learner.error for name, learner in found.learners.items()}
    if "causal_decoder" not in errors:
        return None
    last = max(errors["causal_decoder"], key=int)
    scores = {
        spelled(name): as_score(error[last])
        for name, error in errors.items()
        if name in in_context_regression.ARCHITECTURES
    }
    causal = scores.pop("causal decoder")
    colours = {
        c.architecture: study.look[c.label].key for c in (*reversed(study.raw), study.decoder)
    }
    return rules.in_context(causal, scores), figures.in_context(found, colours)


def _position(study: Compared, probed: Mapping[str, Probed]) -> Made:
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
    last = as_score(streams[mine].layers[-1].of_chance)
    verdict = rules.position(second[mine], both_ways, cost, mine, last)
    return verdict, figures.position(streams, study.look)


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
    row = study.decoder.section("model").get("sequence_length", 0)
    panel = figures.caches(turns, able[study.decoder.label].tokens, row, study.look)
    totals = {label: sum(flops) for label, flops in turns.items()}
    return rules.caches(totals, study.decoder.label), panel


def _tools(study: Compared, probed: Mapping[str, Probed]) -> Made:
    found: Throughput = probed["masks"].cells[catalogue.ALONE]
    return rules.tools(found.least(ours=True), found.least(ours=False)), figures.tools(found)


MAKERS = (_generalization, _rank, _difficulty, _in_context, _position, _caches, _tools)
