"""The record of a checkpoint, beside its state: totals, settings and what it was trained on."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from megaarch.errors import UserError
from megaarch.files import Schema, fit, read_json

PROGRESS = "progress.json"
# The version of what objectives make of a document. Raise it where an objective's samples change.
SAMPLES = 2
CHANGED_SINCE_1 = ("span_corruption", "denoising", "blank_infilling", "permutation_lm", "ul2")
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Section = dict[str, Any]


class _Open(Schema):
    """Keeps the keys that other versions wrote."""

    model_config = ConfigDict(extra="allow")


class Progress(_Open):
    """Running totals of a run. The loader's position is `step`.

    flops: exact training FLOPs. palm_flops: the same by PaLM's convention. seen_tokens: tokens
    that passed through the model, padding left out. target_tokens: targets of non-zero weight.
    slots: tokens with padding. seconds: wall time of the steps and of waiting for their batches;
    evaluation and checkpoints are left out.
    skipped: steps whose loss or gradient was not finite.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # an unknown total would not be added to

    step: Count
    flops: Count
    palm_flops: Amount
    seen_tokens: Count
    target_tokens: Count
    slots: Count
    seconds: Amount
    skipped: Count

    def plus(self, **more: float) -> "Progress":
        """Returns the totals with these amounts added."""
        return self.model_copy(
            update={name: getattr(self, name) + amount for name, amount in more.items()}
        )

    def since(self, begin: "Progress") -> "Progress":
        """Returns what was added to the totals `begin`."""
        return self.plus(**{name: -getattr(begin, name) for name in Progress.model_fields})


NO_PROGRESS = Progress(**dict.fromkeys(Progress.model_fields, 0))  # of a run that begins


class SavedData(_Open):
    objective: str
    source: str | list[Section]


class SavedSettings(_Open):
    model: Section
    data: SavedData
    training: Section
    logging: Section
    parallel: Section = Field(default_factory=dict)


class SavedTokenizer(_Open):
    path: str
    fingerprint: str | None


class CheckpointRecord(_Open):
    """A checkpoint's progress.json. fingerprint: of the data. weights_only: of a converted one, which
    has no optimizer's state. samples: `SAMPLES` of the run; None where an earlier version wrote it.
    inherited: of `progress`, what the run began with (training.start_optimizer); None: nothing.
    generation: how many runs there were before it, of whose weights it began with samples of its own; 0 also
    where an earlier version wrote it, whose runs began their parents' samples anew. unscored: held-out text is
    to be scored at this step, after the save."""

    progress: Progress
    inherited: Progress | None = None
    fingerprint: str | None
    settings: SavedSettings
    tokenizer: SavedTokenizer
    weights_only: bool = False
    samples: Count | None = None
    generation: Count = 0
    unscored: bool = False

    def raw(self) -> Section:
        """Returns the record as JSON has it, without what was not in the file."""
        return self.model_dump(mode="json", exclude_unset=True)

    def raw_settings(self) -> Section:
        return self.settings.model_dump(mode="json", exclude_unset=True)

    def samples_version(self) -> int:
        if self.samples is not None:
            return self.samples
        return 1 if self.settings.data.objective in CHANGED_SINCE_1 else SAMPLES


def read_record(path: Path) -> CheckpointRecord:
    """Reads the record of the checkpoint at `path`. UserError where it is damaged, or of another
    step than the folder is named after (a copy of another checkpoint)."""
    record = fit(read_json(path / PROGRESS), CheckpointRecord, path / PROGRESS)
    step, named = record.progress.step, path.name.removeprefix("step-")
    if path.name != named and named.isdecimal() and int(named) != step:
        raise UserError(f"its folder is named after step {int(named)}, and it is of step {step}")
    return record
