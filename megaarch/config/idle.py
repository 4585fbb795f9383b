"""Settings that are given and have no effect, because of another one. They are told and not refused: the settings
of a run that continues may not change."""

from collections.abc import Iterator

from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.config.suggest import flatten

# settings, the one that they depend on, and its values under which nothing reads them
IDLE = (
    (("model.rope_base",), "model.position_encoding", ("learned", "relative", "none")),
    (
        ("model.relative_buckets", "model.relative_max_distance"),
        "model.position_encoding",
        ("rope", "learned", "none"),
    ),
    (
        ("model.learned_positions", "model.position_offset"),
        "model.position_encoding",
        ("rope", "relative", "none"),
    ),
    (("training.decay",), "training.schedule", ("cosine", "inverse_square_root", "constant")),
    (
        ("training.minimum_learning_rate",),
        "training.schedule",
        ("inverse_square_root", "constant"),
    ),
    (
        ("training.beta1", "training.beta2", "training.epsilon"),
        "training.optimizer",
        ("sgd", "adafactor"),
    ),
    (("training.eval_documents",), "training.eval_every", (0,)),
    (("parallel.schedule",), "parallel.pipeline_parallel", (1,)),
    (("logging.profile_steps", "logging.profile_ranks"), "logging.profile_from", (0,)),
)


def idle(settings: Settings) -> Iterator[str]:
    """Yields a sentence for each setting that is not at its default and has no effect in a run."""
    given, defaults = (flatten(each.model_dump()) for each in (settings, Settings()))
    for names, chooser, values in IDLE:
        for name in names if given[chooser] in values else ():
            if given[name] != defaults[name]:
                yield f"{name}: {given[name]} has no effect, for {chooser} is {given[chooser]}"
    objective = catalogue.OBJECTIVES[settings.data.objective]
    name = "data.document_masks" if objective.of_pairs else "data.pack"
    if given[name] != defaults[name]:
        yield f"{name}: {given[name]} has no effect, for data.objective is {objective.name}"
