"""The settings that decide a run's result, flat: for a resumed run, and for a finished cell."""

import re
from typing import Any

from megaarch.config.schema import Evaluation, Settings
from megaarch.config.suggest import flatten

# where and how fast a run happens, not what comes of it; a name with a dot at its end is a section
VOLATILE = (
    "study",
    "study.",
    "logging.",
    "parallel.",
    "data.workers",
    "data.cache",
    "model.attention",
    "model.fused_kernels",
    "training.resume",
    "training.threads",
    "training.device",
    "training.compile",
    "training.float8_emulate",
    "training.deterministic",
    "training.micro_batch_size",
    "training.eval_every",
    "training.eval_documents",
    "training.save_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.async_save",
    "training.heartbeat_timeout",
    "training.hang_timeout",
    "training.skip_limit",  # it decides whether a run comes to its end, and nothing of what it gives
    "training.start_from",
)
SCORING = "study.evaluation."  # of these a run knows nothing; the scores of a cell depend on them
# what a resumed run may change: how far it goes; its data are guarded by their fingerprint
RESUMABLE = (
    "training.steps",
    "training.budget",
    "training.budget.",
    "data.source",
    "data.tokenizer",
)


def fingerprint(settings: Settings | dict[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the settings that decide a result, flat, without `but` (names, or sections)."""
    if isinstance(settings, Settings):
        settings = settings.model_dump(mode="json", by_alias=True)
    names = (*VOLATILE, *but)
    return {k: v for k, v in flatten(settings).items() if not _among(k, names)}


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Returns the settings in which two fingerprints differ, each with a phrase of both values. One that an earlier
    version took for decisive does not count, nor one that it did not have at its default."""
    defaults = flatten(Settings().model_dump(mode="json", by_alias=True))
    defaults |= {SCORING + k: v for k, v in Evaluation().model_dump(mode="json").items()}
    changed = {}
    for key in sorted({**before, **after}):
        name = re.sub(r"^(from\.)+", "", key)
        new = key not in before and name in defaults and defaults[name] == after[key]
        volatile = _among(name, VOLATILE) and not name.startswith(SCORING)
        if before.get(key) != after.get(key) and not new and not volatile:
            changed[key] = f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
    return changed


def _among(name: str, names: tuple[str, ...]) -> bool:
    sections = tuple(given for given in names if given.endswith("."))
    return name in names or name.startswith(sections)
