"""The cells of a study: cells × sizes × budgets × seeds, each resolved to settings of its own."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.schema import Budget, Cell, Model, Settings, Size, Study, Training
from megaarch.config.suggest import flatten
from megaarch.errors import UserError
from megaarch.model.parameter_count import parameter_count
from megaarch.study import adapt, sweep_grid
from megaarch.study.sweep_grid import BATCH, RATE, SHARE, Choice

BUDGET_UNIT = {"parameters": "seen_tokens"}  # equal parameters, and equal tokens beside them


@dataclass(frozen=True)
class StudyCell:
    """One run of a study. `parent` is the key of the cell whose weights it starts from; `inherited`
    the part of its training.budget that its parents have spent (training.start_optimizer);
    `adaptation` what it adds where study.adapt has made it; `keeps_rate` whether its own settings give its learning
    rate, and no sweep; `choice` what is tried where it is a trial."""

    name: str
    size: str | None
    budget: float
    seed: int
    settings: Settings
    parent: str | None
    inherited: float = 0.0
    adaptation: float | None = None
    keeps_rate: bool = False
    choice: Choice | None = None

    @property
    def key(self) -> str:
        """Names the cell and its folder; does not change when the study grows."""
        return _key(self.name, self.size, self.budget, self.seed)

    @property
    def rate_key(self) -> str:
        """Names what a sweep chooses for: the cell whatever its seed."""
        return _rate_key(self.name, self.size, self.budget)

    @property
    def training_budget(self) -> Budget:
        """Of its run: what its parents have spent, if it counts on, and its own."""
        found = self.settings.training.budget
        assert found is not None, "expand gives every cell one"
        return found

    @property
    def folder(self) -> Path:
        return Path(self.settings.logging.directory)

    @property
    def locked(self) -> Path:
        """The folder that no other process may use meanwhile: a cell's, or that of all trials of a choice."""
        if self.choice is None:
            return self.folder
        return self.folder.parent / "locks" / sweep_grid.folder_name(self.choice)

    def tried(self, study: Study) -> list[Choice]:
        """What a sweep of the study tries on this cell: of the first seed alone, whose choice serves the others. With
        a rate of its own, what is swept beside rates."""
        held = sweep_grid.holds(study, self.size) and self.seed == study.seeds[0]
        if study.tune is None or not held:
            return []
        grid = sweep_grid.of_architecture(study.tune, self.settings.model.architecture)
        if not self.keeps_rate:
            return grid
        own = {RATE: self.settings.training.learning_rate}
        grid = sweep_grid.distinct([choice | own for choice in grid])
        return grid if len(grid) > 1 else []

    def trial(self, choice: Choice, share: float) -> "StudyCell":
        """The trial on this cell, which has the settings that are tried (sweep.trials): with a share of its budget and
        a folder of its own."""
        training, logging = self.settings.training, self.settings.logging
        folder = self.folder / "tune" / f"{sweep_grid.folder_name(choice)}-share-{share:.3g}"
        amount = self.training_budget.amount * share
        budget = self.training_budget.model_copy(update={"amount": amount})
        own = {"learning_rate": choice[RATE], "budget": budget}
        settings = self.settings.model_copy(
            update={
                "training": training.model_copy(update=own),
                "logging": logging.model_copy(update={"directory": str(folder)}),
            }
        )
        return replace(self, settings=settings, choice=choice)


def _rate_key(name: str, size: str | None, budget: float) -> str:
    return f"{name}/{size or 'base'}-{budget:.4g}"


def _key(name: str, size: str | None, budget: float, seed: int) -> str:
    return f"{_rate_key(name, size, budget)}-seed{seed}"


def study_of(raw: config.Raw, where: str = "") -> Study:
    """The study that a configuration holds. ConfigError where it holds none, or one that is wrong; it
    names `where` the configuration is from."""
    study = config.resolve(raw, where).study
    if study is None:
        raise config.ConfigError(["study: is required: this configuration has no grid of cells"])
    return study


def expand(
    raw: config.Raw, directory: Path, chosen: Mapping[str, Choice] | None = None
) -> list[StudyCell]:
    """All cells of a study's raw configuration, parents before their children.

    directory: of the study; cells log below it. chosen: what a sweep chose, by `rate_key` or by cell
    name. ConfigError names the cell at fault.
    """
    study = study_of(raw)
    return [
        cell
        for size in study.sizes or [None]
        for amount in study.budgets
        for seed in study.seeds
        for cell in _Place(raw, study, directory, chosen or {}, size, amount, seed).cells()
    ]


@dataclass(frozen=True)
class _Place:
    """One size, budget and seed of a study's grid."""

    raw: config.Raw
    study: Study
    directory: Path
    chosen: Mapping[str, Choice]
    size: Size | None
    amount: float
    seed: int

    def cells(self) -> list[StudyCell]:
        """All cells of the place; adapted ones last."""
        found: dict[str | None, StudyCell] = {}
        for each in self.study.cells:
            cell = self._resolve(each, self._choice(each.name, {}))
            found[each.name] = _after(found.get(each.start_from), cell)
        adapted = []
        for each in self.study.cells if self.study.adapt else ():
            assert self.study.adapt is not None
            parent = found[each.name]
            if adapt.obstacle(parent.settings, self.study.adapt):
                continue
            child = adapt.child_of(each, parent.settings, self.study.adapt)
            choice = self._choice(child.name, self._choice(each.name, {}))
            cell = _after(parent, self._resolve(child, choice))
            adapted.append(replace(cell, adaptation=self.study.adapt.budget))
        return [*found.values(), *adapted]

    def _choice(self, name: str, default: Choice) -> Choice:
        rate_key = _rate_key(name, self.size and self.size.name, self.amount)
        return self.chosen.get(rate_key, self.chosen.get(name, default))

    def _resolve(self, cell: Cell, choice: Choice) -> StudyCell:
        study, size_name = self.study, self.size and self.size.name
        own = copy.deepcopy({k: v for k, v in self.raw.items() if k != "study" and v is not None})
        model = own.setdefault("model", {})
        if self.size is not None:
            given = self.size.model_dump(exclude={"name"})
            model |= {k: v for k, v in given.items() if v is not None}
        if cell.preset:
            model.pop("architecture", None)
            own.setdefault("data", {}).pop("objective", None)
            model["preset"] = cell.preset
        if BATCH in choice:
            own.get("training", {}).pop("global_batch_size", None)
        for path, value in choice.items():
            if path != SHARE:
                config.set_path(own, path, value)
        for path, value in cell.set.items():
            config.set_path(own, path, copy.deepcopy(value))
        _fill_defaults(own, self.raw)
        budget = self.amount if cell.budget is None else cell.budget
        match = BUDGET_UNIT.get(study.match, study.match)
        config.set_path(own, "training.budget", {"match": match, "amount": budget})
        config.set_path(own, "training.seed", self.seed)
        folder = self.directory / "cells"
        key = _key(cell.name, size_name, self.amount, self.seed)
        config.set_path(own, "logging.directory", str(folder / key))
        parent = None
        if cell.start_from:
            parent = _key(cell.start_from, size_name, self.amount, self.seed)
            config.set_path(own, "training.start_from", str(folder / parent))
        settings = config.resolve(own, f"cell {cell.name}")
        if study.encoder_decoder_size == "parameters" or study.match == "parameters":
            settings = _match_parameters(settings, choice.get(SHARE))
        elif SHARE in choice:
            settings = _divide_layers(settings, choice[SHARE])
        keeps_rate = RATE in flatten(cell.set)
        place = cell.name, size_name, self.amount, self.seed
        return StudyCell(*place, settings, parent, keeps_rate=keeps_rate)


def not_adapted(cells: list[StudyCell], study: Study) -> list[str]:
    """Says which cells of a study `study.adapt` leaves out, and why."""
    left_out: dict[str, dict[str, None]] = {}  # reason -> names, in their order
    for cell in cells:
        why = study.adapt and adapt.obstacle(cell.settings, study.adapt)
        if why and cell.adaptation is None:
            left_out.setdefault(why, {})[cell.name] = None
    return [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not adapted (study.adapt): {why}."
        for why, names in left_out.items()
    ]


def _after(parent: StudyCell | None, cell: StudyCell) -> StudyCell:
    """The cell, its budget counted from its parent's first step where it takes the optimizer along."""
    training = cell.settings.training
    if parent is None or not training.start_optimizer:
        return cell
    spent = parent.training_budget.amount
    amount = spent + cell.training_budget.amount
    budget = cell.training_budget.model_copy(update={"amount": amount})
    settings = cell.settings.model_copy(
        update={"training": training.model_copy(update={"budget": budget})}
    )
    return replace(cell, settings=settings, inherited=spent)


def _fill_defaults(own: config.Raw, raw: config.Raw) -> None:
    """Writes what a study has by default where a cell's settings `own` do not say otherwise: documents
    that do not see each other, and batches of equal tokens. raw: of the study."""
    if config.get_path(own, "data.document_masks") is None:
        config.set_path(own, "data.document_masks", True)
    given = ("training.global_batch_size", "training.global_batch_tokens")
    if all(config.get_path(own, name) is None for name in given):
        row = config.get_path(raw, "model.sequence_length") or Model().sequence_length
        if isinstance(row, int):  # else its own mistake is told
            config.set_path(own, given[1], Training().global_batch_size * row)


def generations(cells: list[StudyCell]) -> Iterator[list[StudyCell]]:
    """Cells in the order in which they can run: those without a parent, then their children, ..."""
    left, done = list(cells), {None}
    while left:
        ready = [cell for cell in left if cell.parent in done]
        done |= {cell.key for cell in ready}
        left = [cell for cell in left if cell not in ready]
        yield ready


def find(cells: list[StudyCell], which: str) -> StudyCell:
    """The cell that `which` names: its number, its key, or a name that only one cell has.
    UserError where it names none or several."""
    numbered = {str(i): cell for i, cell in enumerate(cells)}
    if which in numbered:
        return numbered[which]
    found = [cell for cell in cells if which == cell.key]
    found = found or [cell for cell in cells if which == cell.name]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(cell.key for cell in found or cells)
    what = f"{len(found)} cells of that name" if found else "no such cell"
    raise UserError(
        f"--cell {which}: {what}; give a number from 0 to {len(cells) - 1}, or one of {keys}"
    )


def title(cell: StudyCell, study: Study) -> str:
    """The cell's name for a person: as little of its key as tells it from the others, and what a trial tries."""
    several = len(study.sizes) > 1 or len(study.budgets) > 1 or len(study.seeds) > 1
    name = cell.key if several else cell.name
    return name if cell.choice is None else f"{name} {sweep_grid.label(cell.choice)}"


def _divide_layers(settings: Settings, share: float) -> Settings:
    """Gives the encoder its share of the layers that both stacks have together, one each at least."""
    model = settings.model
    both = (model.encoder_layers or model.layers) + (model.decoder_layers or model.layers)
    return settings.model_copy(update={"model": _with_stacks(model, *_divided(both, share))})


def _divided(layers: int, share: float) -> tuple[int, int]:
    encoder = min(max(round(share * layers), 1), layers - 1)
    return encoder, layers - encoder


def _with_stacks(model: Model, encoder: int, decoder: int) -> Model:
    return model.model_copy(update={"encoder_layers": encoder, "decoder_layers": decoder})


def _match_parameters(settings: Settings, share: float | None = None) -> Settings:
    """Gives an encoder-decoder the stacks whose parameters come nearest to one stack of `layers`, of
    about the same depth or of the encoder's share. Where the depth of a stack is given, and no share,
    nothing changes."""
    model = settings.model
    given = model.encoder_layers or model.decoder_layers
    if len(catalogue.ARCHITECTURES[model.architecture].streams) == 1 or (given and share is None):
        return settings
    single = model.model_copy(update={"architecture": "causal_decoder"})
    wanted = parameter_count(single)
    # every layer of a stack adds the same
    least, more, most = (
        parameter_count(_with_stacks(model, *stacks)) for stacks in ((1, 1), (2, 1), (1, 2))
    )
    of_encoder, of_decoder = more - least, most - least
    if share is None:
        candidates = [
            (encoder, decoder)
            for encoder in range(1, model.layers + 1)
            for decoder in (encoder - 1, encoder, encoder + 1)
            if decoder > 0
        ]
    else:
        candidates = [_divided(layers, share) for layers in range(2, 2 * model.layers + 1)]

    def distance(stacks: tuple[int, int]) -> int:
        encoder, decoder = stacks
        found = least + (encoder - 1) * of_encoder + (decoder - 1) * of_decoder
        return abs(found - wanted)

    best = _with_stacks(model, *min(candidates, key=distance))
    return settings.model_copy(update={"model": best})
