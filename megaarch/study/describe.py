"""Describes cells before anything is trained: parameters, and what a row costs and holds."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megaarch import config
from megaarch.config import Raw, catalogue
from megaarch.config.schema import Data, Model, Settings
from megaarch.data.batch import Batch
from megaarch.data.blend import Blend
from megaarch.data.dataset import Rows, pair_lengths
from megaarch.data.example import (
    SPECIALS,
    Converted,
    Converter,
    Lengths,
    RowShape,
    Vocabulary,
    generator,
)
from megaarch.data.feature_converters import converter_of
from megaarch.data.objectives.language_modelling import supervised
from megaarch.data.packing import pack
from megaarch.data.row_lengths import check_positions, fixed_shape, segmentations
from megaarch.errors import UserError
from megaarch.ingest.prepare import prepare
from megaarch.ingest.prepared_data import Prepared
from megaarch.model import flops
from megaarch.model.parameter_count import non_embedding_parameter_count, parameter_count
from megaarch.study import data as study_data
from megaarch.study.cells import expand

log = logging.getLogger(__name__)
SAMPLES = 64  # rows over which random lengths are averaged
MOST_TOKENS = 1 << 22  # of these rows together; of longer ones fewer are drawn
WORD, SENTENCE = 2, 20  # tokens of a word and of a sentence in the made-up text


@dataclass(frozen=True)
class Description:
    """One entry of `describe --json`. *_per_row and lengths: means over rows."""

    name: str
    architecture: str
    objective: str
    parameters: int
    non_embedding_parameters: int
    flops_per_row: float
    palm_flops_per_row: float
    seen_tokens_per_row: float
    target_tokens_per_row: float
    lengths: dict[str, float]


def describe(settings: Settings, name: str, rows: Rows | None = None) -> Description:
    """Rows are made-up text, drawn with fixed keys; exact where the objective's lengths are. Given
    rows of a run's own data (on which supervised ones depend), the first of those."""
    model, data = settings.model, settings.data
    axes = catalogue.position_axes(data.objective)
    drawn = made_up_rows(model, data) if rows is None else first_rows(rows)
    counts, lengths = row_counts(model, *drawn)
    parameters, n = parameter_count(model, axes), counts.rows
    return Description(
        name=name,
        architecture=model.architecture,
        objective=data.objective,
        parameters=parameters,
        non_embedding_parameters=non_embedding_parameter_count(model, axes),
        flops_per_row=flops.training(model, counts) / n,
        palm_flops_per_row=flops.palm(model, counts, parameters) / n,
        seen_tokens_per_row=sum(counts.tokens) / n,
        target_tokens_per_row=counts.targets / n,
        lengths=lengths,
    )


def count_flops(settings: Settings, batch: Batch | None = None) -> float:
    """Returns the exact training FLOPs of `batch` or, without one, those of a row, as a mean over
    rows of made-up text (exact where the objective's lengths are fixed)."""
    if batch is not None:
        return flops.training(settings.model, batch.counts)
    return describe(settings, "").flops_per_row


def made_up_rows(
    model: Model, data: Data, samples: range | None = None
) -> tuple[list[list[Converted]], RowShape, float]:
    """Rows of made-up text, their shape, and the raw tokens of a row. samples: which; None: the
    first ones, as many as figures are averaged over."""
    vocabulary = made_up_vocabulary(model.vocabulary_size, data.sentinels)
    converter = converter_of(model.architecture)
    if data.objective == "supervised":
        return _made_up_pair(model, data, vocabulary, converter)
    shares, plans = zip(*segmentations(model, data), strict=True)
    blend = Blend(list(shares), 0)
    rows, raw = [], []
    shape = fixed_shape(model, [plan.shape for plan in plans])
    check_positions(model, data.objective, shape)
    for i in range(_samples(shape)) if samples is None else samples:
        plan = plans[blend[i][0]]
        tokens = made_up_tokens(vocabulary, plan.raw)
        rows.append(
            [converter(o(tokens, vocabulary, generator(0, i)), vocabulary) for o in plan.objectives]
        )
        raw.append(plan.tokens)
    return rows, shape, float(np.mean(raw))


def _made_up_pair(
    model: Model, data: Data, vocabulary: Vocabulary, converter: Converter
) -> tuple[list[list[Converted]], RowShape, float]:
    """A row of one pair, as long as its limits and the row allow."""
    longest = np.array([[model.sequence_length] * 2])
    lengths, room = pair_lengths(longest, model, data)
    inputs, targets = (int(length) for length in lengths[0])
    text, answer = (made_up_tokens(vocabulary, length) for length in (inputs, targets - 1))
    made = converter.shape(Lengths(inputs, targets))
    shape = RowShape(room, made.targets, made.parts, made.cross_parts)
    check_positions(model, data.objective, shape)
    row = [converter(supervised(text, answer, vocabulary), vocabulary)]
    return [row], shape, float(inputs + targets)


def _samples(shape: RowShape) -> int:
    return max(1, min(SAMPLES, MOST_TOKENS // sum(shape.streams)))


def first_rows(rows: Rows) -> tuple[list[list[Converted]], RowShape, float]:
    """Returns what `made_up_rows` does, from a run's own data."""
    first = [rows[i] for i in range(_samples(rows.shape))]
    tokens = sum(len(s.tokens) for row in first for example in row for s in example.streams)
    return first, rows.shape, tokens / len(first)


def row_counts(model: Model, rows: list[list[Converted]], shape: RowShape, raw: float):
    """Counts of these rows, and the lengths of a row."""
    axes = rows[0][0].streams[0].positions.shape[1]
    batch = pack(rows, shape, pad=0, axes=axes, sample_index=range(len(rows)))
    names = catalogue.ARCHITECTURES[model.architecture].streams
    lengths = {
        "raw": raw,
        "targets": batch.counts.targets / len(rows),
        **{name: n / len(rows) for name, n in zip(names, batch.counts.tokens, strict=True)},
    }
    return batch.counts, lengths


def made_up_batch(settings: Settings, index: int, multiple: int = 1) -> Batch:
    """Micro-batch number `index` of made-up text, its streams' lengths a multiple of `multiple`."""
    size = settings.training.micro_batch_size
    samples = range(index * size, (index + 1) * size)
    rows, shape, _ = made_up_rows(settings.model, settings.data, samples)
    axes = catalogue.position_axes(settings.data.objective)
    return pack(rows, shape, pad=0, axes=axes, sample_index=samples, multiple=multiple)


def made_up_vocabulary(size: int, sentinels: int) -> Vocabulary:
    """A vocabulary of `size` ids in which every second token begins a word."""
    base = size - len(SPECIALS) - sentinels
    if base < 2 * SENTENCE:
        raise UserError(
            f"model.vocabulary_size: {size} is too small for {len(SPECIALS)} special tokens, "
            f"{sentinels} sentinels and text"
        )
    ids = np.arange(size)
    text = ids < base
    return Vocabulary(
        size=size,
        sentinels=sentinels,
        special={name: base + i for i, name in enumerate(SPECIALS)},
        text=text,
        word_start=text & (ids % WORD == 0),
        sentence_end=text & (ids % SENTENCE == SENTENCE - 1),
    )


def made_up_tokens(vocabulary: Vocabulary, length: int) -> np.ndarray:
    """`length` text tokens in which words and sentences have their made-up lengths."""
    top = int(vocabulary.text.sum()) // SENTENCE * SENTENCE
    return np.arange(length, dtype=np.int64) % top


def describe_all(raw: Raw) -> list[Description]:
    """Describes every cell of a study, or the one model of a plain configuration."""
    settings = config.resolve(raw)
    base, size = settings.data, settings.model.vocabulary_size
    if settings.study is None:
        name = settings.model.preset or settings.model.architecture
        return [describe(settings, name, _own_rows(settings, lambda: prepare(base, size)))]
    described = {}
    for cell in expand(raw, Path("runs") / settings.study.name):
        name = f"{cell.name}-{cell.size}" if cell.size else cell.name
        if name not in described:  # budgets and seeds change nothing here
            own = _own_rows(cell.settings, partial(study_data.text_of, cell, base))
            described[name] = describe(cell.settings, name, own)
    return list(described.values())


def _own_rows(settings: Settings, prepared: Callable[[], Prepared]) -> Rows | None:
    """Rows of the run's own data, where lengths depend on them; else None. Of pairs that are not there,
    the longest that the settings allow are described."""
    if settings.data.objective != "supervised":
        return None
    sources = settings.data.source
    paths = [sources] if isinstance(sources, str) else [source.path for source in sources]
    if missing := [path for path in paths if not Path(path).exists()]:
        log.warning("%s is not there: a row is described as one pair that fills it", missing[0])
        return None
    return Rows(settings.model, settings.data, prepared(), settings.training.seed)


def table(cells: list[Description]) -> str:
    """The cells for a terminal, within 80 columns."""
    lines = [
        f"{'cell':<22}{'architecture':<17}{'params':>9}{'FLOPs/row':>11}{'seen':>7}{'targets':>9}"
    ]
    for cell in cells:
        lines.append(
            f"{cell.name:<22.21}{cell.architecture:<17}{_short(cell.parameters):>9}"
            f"{cell.flops_per_row:>11.3e}{cell.seen_tokens_per_row:>7.0f}"
            f"{cell.target_tokens_per_row:>9.1f}"
        )
    return "\n".join(lines)


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3f}{letter}"
    return str(int(number))
