"""What stands beside the state of a checkpoint: its totals and settings, and its manifest."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megaarch.errors import UserError
from megaarch.files import Schema, fit, inside, read_json

PROGRESS, MANIFEST = "progress.json", "manifest.json"
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Entry = tuple[Count, Count]  # size, checksum
Section = dict[str, Any]


class _Totals(Schema):
    step: Count
    flops: Count
    palm_flops: Amount
    seen_tokens: Count
    target_tokens: Count
    slots: Count
    seconds: Amount
    skipped: Count


class _Data(Schema):
    objective: str
    source: str | list[Section]


class _Settings(Schema):
    model: Section
    data: _Data
    training: Section
    logging: Section
    parallel: Section = Field(default_factory=dict)


class _Tokenizer(Schema):
    path: str
    fingerprint: str | None


class _Record(Schema):
    progress: _Totals
    fingerprint: str | None
    settings: _Settings
    tokenizer: _Tokenizer
    weights_only: bool = False


class _Manifest(Schema):
    files: dict[str, Annotated[Entry, Field(strict=False)]]


def read_progress(path: Path) -> dict[str, Any]:
    """The totals, settings and fingerprint saved with a checkpoint. ValueError where they are
    damaged, or of another step than the folder is named after (a copy of another checkpoint)."""
    found = read_json(path / PROGRESS)
    step = fit(found, _Record, path / PROGRESS).progress.step
    named = path.name.removeprefix("step-")
    if path.name != named and named.isdecimal() and int(named) != step:
        raise UserError(f"its folder is named after step {int(named)}, and it is of step {step}")
    return found


def read_manifest(path: Path) -> dict[str, Entry]:
    """Size and checksum of each file of a checkpoint. ValueError where the manifest is damaged or
    lists what is not in the checkpoint's folder."""
    found = fit({"files": read_json(path / MANIFEST)}, _Manifest, path / MANIFEST).files
    for name in found:
        inside(path, name)
    return found
