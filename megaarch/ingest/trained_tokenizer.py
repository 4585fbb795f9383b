"""The tokenizer that a model was trained with."""

from pathlib import Path

from megaarch.checkpoint.record import CheckpointRecord
from megaarch.config.schema import Settings
from megaarch.errors import UserError
from megaarch.ingest.tokenizer import Tokenizer


def tokenizer_of(
    saved: CheckpointRecord, settings: Settings, given: str | None, run: Path
) -> Tokenizer:
    """Returns the tokenizer of a run, or of a file that it was converted to, from the file `given` where the
    recorded one has moved. A relative path is one from where the run was started, a folder above it.
    UserError where the file is gone or is another one."""
    used = saved.tokenizer
    places = [*(folder / used.path for folder in run.absolute().parents), Path(used.path)]
    path = next((str(place) for place in places if place.is_file()), used.path)
    try:
        found = Tokenizer(given or path, settings.data.sentinels, settings.model.vocabulary_size)
    except UserError as error:
        if given or Path(path).exists():
            raise
        raise UserError(
            f"{error}: give the file that the run was trained with (--tokenizer)"
        ) from None
    if used.fingerprint is not None and found.fingerprint != used.fingerprint:
        raise UserError(
            f"tokenizer file {found.path} is not the one that the run was trained with: give that file "
            "(--tokenizer)"
        )
    return found
