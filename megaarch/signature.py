"""What decides a run's result, as flat settings: for a resumed run, and for a finished cell."""

from typing import Any

from megaarch.config import flatten
from megaarch.settings import Settings

# where and how fast a run happens, not what comes of it
VOLATILE = (
    "study",
    "logging.",
    "parallel.",
    "data.workers",
    "data.cache",
    "model.attention",
    "training.resume",
    "training.threads",
    "training.device",
    "training.compile",
    "training.deterministic",
    "training.micro_batch_size",
    "training.save_every",
    "training.keep_checkpoints",
    "training.start_from",
)
# what a resumed run may change: how far it goes; its data are guarded by their fingerprint
RESUMABLE = ("training.steps", "training.budget", "data.source", "data.tokenizer")


def signature(settings: Settings | dict[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings that decide a result, flat, without those that begin with one of `but`."""
    if isinstance(settings, Settings):
        settings = settings.model_dump(mode="json", by_alias=True)
    return {k: v for k, v in flatten(settings).items() if not k.startswith((*VOLATILE, *but))}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the settings in which two signatures differ, with both values."""
    return [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted({**before, **after})
        if before.get(key) != after.get(key)
    ]
