"""Settings that are given and have no effect, because of another one. They are told and not refused: the settings
of a run that continues may not change."""

from collections.abc import Iterator

from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.config.suggest import flatten

POSITIONS, SCHEDULE, OPTIMIZER = (
    "model.position_encoding",
    "training.schedule",
    "training.optimizer",
)
# a setting: the one that it depends on, and its values under which nothing reads the first
IDLE = {
    "model.rope_base": (POSITIONS, ("learned", "relative", "none")),
    "model.relative_buckets": (POSITIONS, ("rope", "learned", "none")),
    "model.relative_max_distance": (POSITIONS, ("rope", "learned", "none")),
    "model.learned_positions": (POSITIONS, ("rope", "relative", "none")),
    "model.position_offset": (POSITIONS, ("rope", "relative", "none")),
    "training.decay": (SCHEDULE, ("cosine", "inverse_square_root", "constant")),
    "training.minimum_learning_rate": (SCHEDULE, ("inverse_square_root", "constant")),
    "training.beta1": (OPTIMIZER, ("sgd", "adafactor")),
    "training.beta2": (OPTIMIZER, ("sgd", "adafactor")),
    "training.epsilon": (OPTIMIZER, ("sgd", "adafactor")),
    "training.eval_documents": ("training.eval_every", (0,)),
    "parallel.schedule": ("parallel.pipeline_parallel", (1,)),
    "logging.profile_steps": ("logging.profile_from", (0,)),
    "logging.profile_ranks": ("logging.profile_from", (0,)),
}


def idle(settings: Settings) -> Iterator[str]:
    """Yields a sentence for each setting that is not at its default and has no effect in a run."""
    given, defaults = (flatten(each.model_dump()) for each in (settings, Settings()))
    for name, (chooser, values) in IDLE.items():
        if given[chooser] in values and given[name] != defaults[name]:
            yield f"{name}: {given[name]} has no effect, for {chooser} is {given[chooser]}"
    objective = catalogue.OBJECTIVES[settings.data.objective]
    name = "data.document_masks" if objective.of_pairs else "data.pack"
    if given[name] != defaults[name]:
        yield f"{name}: {given[name]} has no effect, for data.objective is {objective.name}"
