"""Brings a checkpoint of version 0.1 to this version, in place: JSON in the place of pickles, and shards as they are.

Its index becomes plain records (pickled_metadata.py), and plain values are loaded with weights_only.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from megaarch.checkpoint import manifest, storage
from megaarch.checkpoint.record import read_record
from megaarch.checkpoint.retention import complete
from megaarch.errors import UserError
from megaarch.files import (
    LARGEST,
    fit,
    open_regular,
    read_bytes,
    replacing,
    size_and_checksum,
    write_json,
)
from megaarch.interchange import pickled_metadata

VALUES = "__0_{}.distcp"  # beside the shards, which are numbered from 0


def upgrade(given: Path) -> list[Path]:
    """Upgrades a checkpoint, or all of a run's folder, the newest first; returns those that were of version 0.1.
    One that is damaged stays as it was, and a UserError names it once the others are upgraded."""
    one = (given / manifest.MANIFEST).exists()
    found = [given] if one else complete(given / "checkpoints")
    if not found:
        raise UserError(f"{given} has no complete checkpoint: give a run's folder, or a checkpoint")
    upgraded, faults = [], []
    for path in reversed(found):
        try:
            if _upgrade(path):
                upgraded.append(path)
        except (OSError, UserError) as error:
            faults.append(f"{path} was not upgraded: {error}")
    if faults:
        raise UserError("; ".join(faults))
    return upgraded


def _upgrade(path: Path) -> bool:
    """Returns whether it was of version 0.1."""
    sealed, state = manifest.read(path), path / "state"
    if f"state/{storage.INDEX}" in sealed:
        return False
    read_record(path)
    if fault := manifest.first_fault(path, sealed.items()):
        raise UserError(f"it is damaged ({fault}): bring it back, or remove its folder")
    file = state / storage.PICKLED
    try:
        found = pickled_metadata.parse(read_bytes(file, LARGEST))
    except pickled_metadata.Refused as error:
        raise UserError(
            f"{file} is not the metadata of a checkpoint and was not loaded: {error}"
        ) from None
    index = fit(found, storage.Index, file)
    storage.check(index, state, file)
    taken = {name for name in sealed if name.startswith("state/")}
    name = next(n for n in map(VALUES.format, range(len(taken) + 1)) if f"state/{n}" not in taken)
    content, places = b"", {}
    for key, place in index.values.items():
        text = json.dumps(_value(state, place, f"{key} in {state}")).encode()
        places[key] = (name, len(content), len(text))
        content += text
    written = index.model_copy(update={"values": places}).model_dump(mode="json")
    with replacing(state / name) as aside:
        aside.write_bytes(content)
    write_json(state / storage.INDEX, written)
    for made in (name, storage.INDEX):
        manifest.flush(state / made)
        sealed[f"state/{made}"] = size_and_checksum(state / made)
    manifest.flush(state)
    write_json(path / manifest.MANIFEST, dict(sorted(sealed.items())))  # what puts it in force
    return True


def _value(state: Path, place: storage.Place, name: str) -> Any:
    file, start, length = place
    with open_regular(state / file) as stream:
        stream.seek(start)
        content = io.BytesIO(stream.read(length))
    try:
        value = torch.load(content, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, RecursionError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{name} is no plain value and was not loaded: {storage.refusal(error)}"
        ) from None
    return storage.plain(value, name)
