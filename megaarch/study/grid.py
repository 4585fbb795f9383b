"""The grid of a study: cells × sizes × budgets × seeds, each resolved to settings of its own."""

import copy
from dataclasses import dataclass
from pathlib import Path

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.schema import Cell, Model, Settings, Size, Study
from megaarch.model.count import parameter_count

BUDGET_UNIT = {"parameters": "seen_tokens"}  # equal parameters, and equal tokens beside them


@dataclass(frozen=True)
class GridCell:
    """One run of a study. `parent` is the key of the cell whose weights it starts from."""

    name: str
    size: str | None
    budget: float
    seed: int
    settings: Settings
    parent: str | None

    @property
    def key(self) -> str:
        """Names the cell and its folder; does not change when the grid grows."""
        return f"{self.name}/{self.size or 'base'}-{self.budget:.4g}-seed{self.seed}"


def expand(
    raw: config.Raw, directory: Path, rates: dict[str, float] | None = None
) -> list[GridCell]:
    """All cells of a study's raw configuration, parents before their children.

    directory: of the study; cells log below it. rates: learning rate by `rate_key` or by cell
    name, where a sweep chose it. ConfigError names the cell at fault.
    """
    study = config.resolve(raw).study
    if study is None:
        raise config.ConfigError(["study: is required: this configuration has no grid of cells"])
    cells = [
        _resolve(raw, study, cell, size, amount, seed, directory, rates or {})
        for size in (study.sizes or [None])
        for amount in study.budgets
        for seed in study.seeds
        for cell in study.cells
    ]
    return cells


def _resolve(
    raw: config.Raw,
    study: Study,
    cell: Cell,
    size: Size | None,
    amount: float,
    seed: int,
    directory: Path,
    rates: dict[str, float],
) -> GridCell:
    own = copy.deepcopy({k: v for k, v in raw.items() if k != "study" and v is not None})
    model = own.setdefault("model", {})
    if size is not None:
        model |= {k: v for k, v in size.model_dump(exclude={"name"}).items() if v is not None}
    if cell.preset:
        model.pop("architecture", None)
        own.setdefault("data", {}).pop("objective", None)
        model["preset"] = cell.preset
    name = size.name if size else None
    found = GridCell(cell.name, name, amount, seed, Settings(), None)
    rate = rates.get(rate_key(found), rates.get(cell.name))
    if rate is not None:
        config.set_path(own, "training.learning_rate", rate)
    for path, value in cell.set.items():
        config.set_path(own, path, copy.deepcopy(value))
    budget = amount if cell.budget is None else cell.budget
    match = BUDGET_UNIT.get(study.match, study.match)
    config.set_path(own, "training.budget", {"match": match, "amount": budget})
    config.set_path(own, "training.seed", seed)
    config.set_path(own, "logging.directory", str(directory / "cells" / found.key))
    parent = None
    if cell.start_from:
        parent = GridCell(cell.start_from, name, amount, seed, Settings(), None).key
        config.set_path(own, "training.start_from", str(directory / "cells" / parent))
    settings = config.resolve(own, f"cell {cell.name}")
    if study.encoder_decoder_size == "parameters" or study.match == "parameters":
        settings = _match_parameters(settings)
    return GridCell(cell.name, name, amount, seed, settings, parent)


def rate_key(cell: GridCell) -> str:
    """What a sweep chooses a rate for: the cell whatever its seed."""
    return f"{cell.name}/{cell.size or 'base'}-{cell.budget:.4g}"


def title(cell: GridCell, study: Study) -> str:
    """What a person sees of a cell's key: as little as tells it from the others."""
    several = len(study.sizes) > 1 or len(study.budgets) > 1 or len(study.seeds) > 1
    return cell.key if several else cell.name


def _match_parameters(settings: Settings) -> Settings:
    """An encoder-decoder with the stacks whose parameters come nearest to one stack of `layers`.
    Where the depth of a stack is given, it stands as it is."""
    model = settings.model
    given = model.encoder_layers or model.decoder_layers
    if len(catalogue.ARCHITECTURES[model.architecture].streams) == 1 or given:
        return settings
    single = model.model_copy(update={"architecture": "causal_decoder"})
    wanted = parameter_count(single)

    def with_stacks(encoder: int, decoder: int) -> Model:
        return model.model_copy(update={"encoder_layers": encoder, "decoder_layers": decoder})

    # every layer of a stack adds the same
    least, more, most = (
        parameter_count(with_stacks(*stacks)) for stacks in ((1, 1), (2, 1), (1, 2))
    )
    of_encoder, of_decoder = more - least, most - least
    candidates = [
        (encoder, decoder)
        for encoder in range(1, model.layers + 1)
        for decoder in (encoder - 1, encoder, encoder + 1)
        if decoder > 0
    ]

    def distance(stacks: tuple[int, int]) -> int:
        encoder, decoder = stacks
        found = least + (encoder - 1) * of_encoder + (decoder - 1) * of_decoder
        return abs(found - wanted)

    best = with_stacks(*min(candidates, key=distance))
    return settings.model_copy(update={"model": best})
