"""Names of settings: all of them, and the one that a wrong name most likely meant."""

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from megaarch.config.schema import Settings


def setting_names(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all settings."""
    for name, entry in section.model_fields.items():
        name = entry.alias or name
        yield f"{prefix}{name}"
        for below in _sections(entry.annotation):
            yield from setting_names(below, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def flatten(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {'model.layers': 2} for {'model': {'layers': 2}}."""
    flat = {}
    for key, value in raw.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest_setting(path: str) -> str | None:
    """Returns the valid dotted name that a wrong one most likely meant."""
    names = list(setting_names())
    path = re.sub(r"\.\d+(?=\.|$)", "", path)  # list indices are no names
    parent, _, leaf = path.rpartition(".")
    siblings = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == parent}
    if guess := difflib.get_close_matches(leaf, siblings, 1, 0.6):
        return siblings[guess[0]]
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(path, same_leaf or names, 1, 0.0 if same_leaf else 0.6)
    if not close:
        leaves = {name.rpartition(".")[2]: name for name in names}
        close = [leaves[x] for x in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    return close[0] if close else None


def unknown_setting(path: str) -> str:
    """Returns the sentence for a setting that does not exist."""
    guess = nearest_setting(path)
    return f"{path}: unknown setting" + (f"; did you mean {guess}?" if guess else "")
