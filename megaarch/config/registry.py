"""Tables of what a configuration names, which packages outside extend as this one fills them.

An entry is an object, or the "module:attribute" (or module) to import it from on first use: so this
floor names what stands above it and imports none of it. A package outside declares

    [project.entry-points."megaarch.plugins"]
    mine = "my_package.my_module"

and the module, imported before any table is first read, adds to the tables of `catalogue.py`:

    ARCHITECTURES.register(Architecture("mine", ..., converter=MyConverter()))

A notebook or a test calls `register` itself.
"""

import difflib
from collections import UserDict
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from megaarch.errors import UserError

GROUP = "megaarch.plugins"
Entry = TypeVar("Entry")
_read = False  # the entry points, once a process


class UnknownName(UserError, KeyError):
    """A name that a table does not hold."""

    __str__ = Exception.__str__  # KeyError's would put the sentence in quotes


class Registry(UserDict[str, Entry]):
    """Name -> entry, this package's first. kind: what an entry is, for messages. rows: entries with
    a `name`; named: others by name, or where to import them from."""

    def __init__(self, kind: str, *rows: Any, **named: Any):
        super().__init__({row.name: row for row in rows} | named)
        self.kind = kind

    def register(self, entry: Any, name: str | None = None) -> None:
        """Adds an entry. name: of one that has no `name` field. UserError for a taken name."""
        name = name or str(entry.name)
        if name in self.data:
            raise UserError(f"the {self.kind} {name!r} is registered already: choose another name")
        self.data[name] = entry

    def __getitem__(self, name: str) -> Entry:
        """Raises UnknownName, a UserError that lists the names."""
        load_plugins()
        if name not in self.data:
            guess = nearest_of(name, self.data)
            raise UnknownName(
                f"no {self.kind} named {name!r}: choose one of {', '.join(self.data)}{guess}"
            )
        self.data[name] = load(self.data[name])
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        load_plugins()
        return name in self.data

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(list(self.data))

    def __len__(self) -> int:
        load_plugins()
        return len(self.data)


def load(reference: Any) -> Any:
    """Returns the object that a "module:attribute" or the name of a module stands for; any other
    object as it is."""
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def load_plugins() -> None:
    """Imports the modules of all entry points, once. UserError for one that cannot be imported."""
    global _read
    if _read:
        return
    _read = True  # before they are: a plugin reads tables too
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            _read = False
            raise UserError(
                f"the plugin {entry.name} ({entry.value}) cannot be loaded: {error}"
            ) from error


def nearest_of(name: object, names: Any) -> str:
    """Returns the end of a sentence that guesses which of `names` was meant, empty without a
    guess."""
    guess = difflib.get_close_matches(str(name), names, 1, 0.5)
    return f"; did you mean {guess[0]}?" if guess else ""


def name_in(table: Registry, also: tuple[str, ...] = ()) -> PlainValidator:
    """Returns the check of a setting that names an entry of `table`, or is one of `also`. It reads the table when
    a configuration is read: at import, plugins are not there yet."""

    def check(value: Any) -> str:
        names = (*also, *table)
        if not isinstance(value, str) or value not in names:
            raise PydanticCustomError("unknown_name", "{names}", {"names": names})
        return value

    return PlainValidator(check)
