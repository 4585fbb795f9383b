"""The cells that `study.adapt` adds: a child of every cell, trained for the same amount on one
objective (as Wang et al. 2022, arXiv:2204.05832, adapt models to other masks and objectives)."""

from megaarch.config import catalogue
from megaarch.config.schema import ADAPTED, Adapt, Cell, Settings
from megaarch.config.suggest import flatten
from megaarch.model.positions import position_scheme, scheme_fault


def child_of(cell: Cell, settings: Settings, adapt: Adapt) -> Cell:
    """Returns the child of a cell of these settings: its own but for the objective and its noise."""
    noise = {f"data.{name}" for name in catalogue.NOISE}
    own = {path: value for path, value in flatten(cell.set).items() if path not in noise}
    own["data.objective"] = objective_for(settings, adapt)
    return Cell.model_validate(
        {
            "name": cell.name + ADAPTED,
            "preset": cell.preset,
            "from": cell.name,
            "budget": adapt.budget,
            "set": own | flatten(adapt.set),
        }
    )


def objective_for(settings: Settings, adapt: Adapt) -> str:
    """Returns the objective that a cell of these settings is adapted to."""
    looks_ahead = catalogue.ARCHITECTURES[settings.model.architecture].looks_ahead
    return adapt.objective or ("prefix_lm" if any(looks_ahead) else "full_lm")


def obstacle(settings: Settings, adapt: Adapt) -> str | None:
    """Returns why a cell of these settings is not adapted; None: it is."""
    architecture, objective = settings.model.architecture, settings.data.objective
    new = objective_for(settings, adapt)
    if catalogue.OBJECTIVES[objective].of_pairs:
        return "what is finetuned on pairs of input and target is left out"
    if new not in catalogue.objectives_of(architecture):
        return f"the architecture {architecture} does not run {new}"
    other = scheme_fault(*(position_scheme(settings.model, o) for o in (objective, new)))
    return other and f"positions mean something else under {new}: {other}"
