"""Segments: how much text a row takes, and under which objective each segment of it stands.

Segments are as long as the row's streams allow. Where an encoder-decoder would leave its decoder
half empty, a row takes two segments that fill both streams together:

    encoder  a a a a a a a a a b b b b b b     a: few targets (an R-denoiser of UL2)
    decoder  a a b b b b b b                   b: many targets (an X-denoiser)
"""

from dataclasses import dataclass, replace

from megaarch.config import catalogue
from megaarch.config.schema import Data, Model
from megaarch.data.example import Converter, Objective, RowShape, SplitObjective, largest_raw
from megaarch.data.feature_converters import converter_of
from megaarch.data.objectives.span_corruption import SpanCorruption, Spans
from megaarch.errors import UserError


@dataclass(frozen=True)
class Segmentation:
    """The segments of a row.

    raw: tokens of a segment. objectives: of each segment. shape: the bound on such a row.
    mirrored: the segments are two examples of one objective that a draw splits, the second the other
        way round, so that inputs and targets of both together are known (Wang et al. 2022, 3.2).
    """

    raw: int
    objectives: tuple[Objective, ...]
    shape: RowShape
    mirrored: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the text that a row takes."""
        return self.raw * len(self.objectives)


Mixed = list[tuple[float, Segmentation]]  # rows of a mixture, each with its share of all rows


def segmentations(model: Model, data: Data) -> Mixed:
    """Returns the rows of the objective's components; shares sum to 1.

    Of two streams, components share rows where that leaves less of the fixed row shape empty. Each
    keeps its share of all segments. UserError where a segment does not fit.
    """
    mixture = components(data)
    alone = _rows(model, [(weight, (objective,)) for weight, objective in mixture])
    if len(mixture) == 1 or len(_limits(model)) == 1:
        return alone
    return max(alone, _rows(model, _pairs(mixture)), key=lambda rows: _filled(model, rows))


def longest_example(model: Model, data: Data) -> tuple[int, tuple[int, ...]]:
    """Returns the tokens of the longest text that an example of the objective is made of, and the most
    positions that each stream of one takes, on the axis that counts text. UserError as `segmentations`,
    and for pairs."""
    converter, axes = converter_of(model.architecture), catalogue.position_axes(data.objective)
    rows = [row for _, row in segmentations(model, data)]
    bounds = [objective.lengths(row.raw) for row in rows for objective in row.objectives]
    positions = (
        (n.inputs,) if n.in_place or axes > 1 else converter.shape(n).streams for n in bounds
    )
    return max(row.raw for row in rows), tuple(map(max, zip(*positions, strict=True)))


def longest_streams(model: Model, data: Data) -> tuple[int, ...]:
    """Returns the most tokens that a row has for an item in each stream: model.sequence_length, and in a
    decoder beside an encoder those of the longest example. UserError as `segmentations`."""
    row, *decoder = _limits(model).values()
    assert row is not None
    if not decoder:
        return (row,)
    if catalogue.OBJECTIVES[data.objective].of_pairs:
        return row, decoder[0] or row
    return row, longest_example(model, data)[1][1]


def spans_of(data: Data, model: Model | None = None) -> Spans | None:
    """Returns the spans that the conditional forms of a run's objective give: those of its noise, of a
    mixture's first. None where they give none.

    model: whose decoder beside an encoder bounds them; None: nothing does. UserError as `segmentations`.
    """
    if not catalogue.OBJECTIVES[data.objective].gives_spans:
        return None
    (_, noise), *_ = components(data)
    assert isinstance(noise, SpanCorruption), "a catalogue's row that gives spans is of such noise"
    decoder = longest_streams(model, data)[1:] if model else ()
    return Spans.of(noise, *decoder)


def _rows(model: Model, groups: list[tuple[float, tuple[Objective, ...]]]) -> Mixed:
    """Returns a row for each group, whose weight is that of a segment of each of its objectives."""
    rows = [(weight, segmentation(model, group)) for weight, group in groups]
    rows = [(weight / (2 if row.mirrored else 1), row) for weight, row in rows]
    total = sum(weight for weight, _ in rows)
    return [(weight / total, row) for weight, row in rows]


def components(data: Data) -> tuple[tuple[float, Objective], ...]:
    """Returns the weighted components of the objective that `data` asks for."""
    given = {name: getattr(data, name) for name in catalogue.NOISE}
    return catalogue.OBJECTIVES[data.objective].components(**given)


def segmentation(model: Model, group: tuple[Objective, ...]) -> Segmentation:
    """Returns the longest segments, one for each objective of `group`, whose row fits `model`'s
    streams.

    UserError where segments of two tokens do not fit.
    """
    converter, limits = converter_of(model.architecture), _limits(model)
    alone = group[0] if len(limits) == 2 and len(group) == 1 else None
    split = alone if isinstance(alone, SplitObjective) else None

    def bound(raw: int) -> RowShape:
        if split:
            return pair_shape(converter, split, raw)
        first, *others = (converter.shape(objective.lengths(raw)) for objective in group)
        return sum(others, first)

    def too_short(raw: int) -> list[str]:
        lengths = zip(bound(raw).streams, limits.items(), strict=True)
        return [name for n, (name, limit) in lengths if limit is not None and n > limit]

    raw = largest_raw(lambda raw: not too_short(raw))
    if raw < 2:
        name = (too_short(2) or list(limits))[0]
        raise UserError(
            f"model.{name}: rows of {limits[name]} tokens are too short for "
            f"{group[0].name} on {model.architecture}"
        )
    row = (split, replace(split, mirrored=True)) if split else group
    return Segmentation(raw, row, bound(raw), mirrored=split is not None)


def pair_shape(converter: Converter, objective: SplitObjective, raw: int) -> RowShape:
    """Returns the bound on the row of two examples of one draw, of `raw` tokens each, of which one is
    mirrored."""
    one = converter.shape(objective.pair(raw))
    return replace(one, parts=2 * one.parts, cross_parts=2 * one.cross_parts)


def _limits(model: Model) -> dict[str, int | None]:
    """Maps the setting that bounds each stream to its value."""
    streams = catalogue.ARCHITECTURES[model.architecture].streams
    names = ("sequence_length", "target_length")[: len(streams)]
    return {name: getattr(model, name) for name in names}


def _pairs(
    mixture: tuple[tuple[float, Objective], ...],
) -> list[tuple[float, tuple[Objective, ...]]]:
    """Returns weighted groups of objectives that share a row: the one with the most targets for its
    inputs with the one with the fewest, and so on towards the middle; what is left over stands
    alone. A component's groups add up to its weight."""
    left = sorted(mixture, key=lambda component: _density(component[1]))
    groups: list[tuple[float, tuple[Objective, ...]]] = []
    while len(left) > 1:
        (first, sparse), *between, (last, dense) = left
        weight = min(first, last)
        groups.append((weight, (sparse, dense)))
        left = [(first - weight, sparse), *between, (last - weight, dense)]
        left = [component for component in left if component[0] > 1e-9]
    return groups + [(weight, (objective,)) for weight, objective in left]


def _density(objective: Objective) -> float:
    """Returns the number of targets for each input of a long segment."""
    lengths = objective.lengths(1 << 16)
    return lengths.targets / lengths.inputs


def _filled(model: Model, rows: Mixed) -> float:
    """Returns the share of the fixed row shape, all streams together, that segments fill in the
    mean."""
    shape = fixed_shape(model, [row.shape for _, row in rows])
    return sum(share * sum(row.shape.streams) for share, row in rows) / sum(shape.streams)


def fixed_shape(model: Model, shapes: list[RowShape]) -> RowShape:
    """Returns one shape for rows of any of `shapes`: the configured lengths where they are
    given."""
    largest = RowShape.largest(shapes)
    configured = (model.sequence_length, model.target_length)[: len(largest.streams)]
    streams = tuple(c or n for c, n in zip(configured, largest.streams, strict=True))
    return replace(largest, streams=streams)


def check_positions(model: Model, objective: str, shape: RowShape) -> None:
    """UserError where a table of learned positions does not reach to the end of rows of this shape."""
    longest = max(shape.streams)
    if model.position_encoding == "learned" and longest > model.position_rows:
        raise UserError(
            f"model.learned_positions: {model.position_rows} positions are fewer than the "
            f"{longest} tokens of a row that {objective} makes: set it to {longest} or "
            "more, or set model.target_length"
        )
