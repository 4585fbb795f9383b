"""What each cell is, before anything is trained: parameters, and what a row costs and holds."""

from pathlib import Path
from typing import Any

import numpy as np

from megaarch import catalogue, config, flops
from megaarch.config import Raw
from megaarch.data.blend import Blend
from megaarch.data.converters import CONVERTERS
from megaarch.data.example import SPECIALS, Vocabulary, generator
from megaarch.data.packing import pack
from megaarch.data.rows import components, fixed_shape, layout
from megaarch.model.count import non_embedding_parameter_count, parameter_count
from megaarch.settings import Data, Model, Settings
from megaarch.study.grid import expand

SAMPLES = 64  # rows over which random lengths are averaged
WORD, SENTENCE = 2, 20  # tokens of a word and of a sentence in the made-up text


def describe(settings: Settings, name: str) -> dict[str, Any]:
    """One entry of `describe --json`. Row figures are means over rows of made-up text, drawn with
    fixed keys; exact where the objective's lengths are."""
    model, data = settings.model, settings.data
    axes = catalogue.position_axes(data.objective)
    counts, lengths = row_counts(model, data)
    parameters = parameter_count(model, axes)
    rows = counts.rows
    return {
        "name": name,
        "architecture": model.architecture,
        "objective": data.objective,
        "parameters": parameters,
        "non_embedding_parameters": non_embedding_parameter_count(model, axes),
        "flops_per_row": flops.training(model, counts) / rows,
        "palm_flops_per_row": flops.palm(model, counts, parameters) / rows,
        "seen_tokens_per_row": sum(counts.tokens) / rows,
        "target_tokens_per_row": counts.targets / rows,
        "lengths": lengths,
    }


def row_counts(model: Model, data: Data):
    """Counts of SAMPLES rows of made-up text, and the lengths of a row."""
    vocabulary = made_up_vocabulary(model.vocabulary_size, data.sentinels)
    converter = CONVERTERS[model.architecture]
    plans = [layout(model, objective) for _, objective in components(data)]
    blend = Blend([weight for weight, _ in components(data)], 0)
    rows, raw = [], []
    for i in range(SAMPLES):
        plan = plans[blend[i][0]]
        tokens = made_up_tokens(vocabulary, plan.raw)
        rows.append(
            [converter(o(tokens, vocabulary, generator(0, i)), vocabulary) for o in plan.segments]
        )
        raw.append(plan.tokens)
    shape = fixed_shape(model, [plan.shape for plan in plans])
    batch = pack(
        rows,
        shape,
        pad=vocabulary.pad,
        axes=catalogue.position_axes(data.objective),
        sample_index=range(SAMPLES),
    )
    names = catalogue.ARCHITECTURES[model.architecture].streams
    lengths = {
        "raw": float(np.mean(raw)),
        "targets": batch.counts.targets / SAMPLES,
        **{name: n / SAMPLES for name, n in zip(names, batch.counts.tokens, strict=True)},
    }
    return batch.counts, lengths


def made_up_vocabulary(size: int, sentinels: int) -> Vocabulary:
    """A vocabulary of `size` ids in which every second token begins a word."""
    base = size - len(SPECIALS) - sentinels
    if base < 2 * SENTENCE:
        raise ValueError(
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


def describe_all(raw: Raw) -> list[dict[str, Any]]:
    """Every cell of a study, or the one model of a plain configuration."""
    settings = config.resolve(raw)
    if settings.study is None:
        return [describe(settings, settings.model.preset or settings.model.architecture)]
    described = {}
    for cell in expand(raw, Path("runs") / settings.study.name):
        name = f"{cell.name}-{cell.size}" if cell.size else cell.name
        if name not in described:  # budgets and seeds change nothing here
            described[name] = describe(cell.settings, name)
    return list(described.values())


def table(cells: list[dict[str, Any]]) -> str:
    """The cells for a terminal, within 80 columns."""
    lines = [
        f"{'cell':<22}{'architecture':<17}{'params':>9}{'FLOPs/row':>11}{'seen':>7}{'targets':>9}"
    ]
    for cell in cells:
        lines.append(
            f"{cell['name']:<22.21}{cell['architecture']:<17}{_short(cell['parameters']):>9}"
            f"{cell['flops_per_row']:>11.3e}{cell['seen_tokens_per_row']:>7.0f}"
            f"{cell['target_tokens_per_row']:>9.1f}"
        )
    return "\n".join(lines)


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3f}{letter}"
    return str(int(number))
