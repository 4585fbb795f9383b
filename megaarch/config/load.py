"""From YAML files and `--set a.b=c` to validated Settings, with all mistakes in one error.

A preset only fills defaults: what the file or `--set` gives stays. Mistakes are gathered (unknown
keys, wrong types, impossible combinations) and raised together as one ConfigError.
"""

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megaarch.config import catalogue
from megaarch.config.registry import load_plugins, nearest_of
from megaarch.config.schema import SOURCE_TAGS, Settings
from megaarch.config.suggest import unknown_setting
from megaarch.config.validate import conflicts
from megaarch.errors import UserError
from megaarch.files import read_text

Raw = dict[str, Any]
LARGEST = 1 << 18  # bytes of a configuration
LARGEST_NODES = 100_000  # values of one, aliases written out


class ConfigError(UserError):
    """Mistakes of the user in a configuration; `problems` has one sentence for each."""

    def __init__(self, problems: Iterable[str], where: str = ""):
        self.problems, self.where = list(dict.fromkeys(problems)), where
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            super().__init__(head + self.problems[0])
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{head}{len(self.problems)} settings are wrong:{lines}")

    def __reduce__(self):
        return type(self), (self.problems, self.where)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (1e-3 is a number), and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is no name", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path, mappings: Sequence[str] = ()) -> Raw:
    """Returns the mapping in a YAML file. ConfigError names file, line and column of what is
    wrong.

    mappings: tags ("!Template") of objects that are read as plain mappings; any other is refused.
    """
    where = str(path)
    try:
        raw = _load(read_text(path, LARGEST), mappings)
    except OSError as error:
        raise ConfigError([f"cannot read the configuration: {error.strerror}"], where) from None
    except UserError as error:
        raise ConfigError([str(error)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"{place}{error.problem or 'not YAML'}"], where) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"is not YAML: {' '.join(str(error).split())}"], where) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError([f"is not YAML that can be read: {error}"], where) from None
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(["must be a mapping of sections (model, data, training, ...)"], where)
    return raw or {}


def _load(text: str, mappings: Sequence[str] = ()) -> Any:
    """Returns what a YAML text says. YAMLError where aliases (*name) repeat it beyond bounds."""
    loader = _Loader(text)
    plain = {
        tag: lambda loader, node: loader.construct_mapping(node, deep=True) for tag in mappings
    }
    loader.yaml_constructors = _Loader.yaml_constructors | plain
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > LARGEST_NODES:
            raise yaml.YAMLError(f"its aliases repeat it to more than {LARGEST_NODES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Returns the number of values below a node, those of an alias counted wherever it stands."""
    if id(node) not in known:
        known[id(node)] = LARGEST_NODES + 1  # of what holds itself, for which there is no end
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            below = [inner for pair in below for inner in pair]
        known[id(node)] = 1 + sum(_expanded(inner, known) for inner in below)
    return known[id(node)]


def parse_override(text: str) -> tuple[str, Any]:
    """Parses 'model.layers=4' to ('model.layers', 4). The value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError([f"--set takes section.name=value, not {text!r}"])
    try:
        return key.strip(), _load(value)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise ConfigError([f"--set {key}: {value!r} is not a YAML value"]) from None


def set_path(raw: Raw, path: str, value: Any) -> None:
    """Sets a dotted path in nested mappings, in place. A mapping goes into the section that is
    there and leaves its other settings as they are."""
    *sections, name = path.split(".")
    for section in sections:
        if raw.get(section) is None:
            raw[section] = {}
        below = raw[section]
        if not isinstance(below, dict):
            raise ConfigError([f"{path}: {section} is a value and has no settings below it"])
        raw = below
    if isinstance(value, dict) and isinstance(raw.get(name), dict):
        for key, inner in value.items():
            set_path(raw[name], key, inner)
    else:
        raw[name] = value


def get_path(raw: Any, path: str) -> Any:
    """Returns the value at a dotted path of nested mappings, or None."""
    for name in path.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Returns the settings of a YAML file with `--set` overrides on top."""
    raw = read_yaml(path)
    for text in overrides:
        set_path(raw, *parse_override(text))
    return resolve(raw, str(path))


def resolve(raw: Raw, where: str = "") -> Settings:
    """Fills in the preset's defaults, checks types and conflicts. Raises ConfigError."""
    load_plugins()  # or the error of a plugin would be reported as that of a setting
    raw = {key: {} if value is None else value for key, value in copy.deepcopy(raw).items()}
    raw = fill_preset(raw)
    problems: list[str] = []
    wrong: set[str] = set()
    for attempt in range(50):  # drop what is wrong, so that conflicts are reported at once too
        try:
            settings = Settings.model_validate(raw)
            break
        except ValidationError as error:
            for fault in error.errors():
                path = ".".join(str(x) for x in fault["loc"] if x not in SOURCE_TAGS)
                # the first pass reports all; what is wrong later, or missing, was dropped here
                if attempt == 0:
                    problems.append(_sentence(path, fault))
                wrong.add(path)
                _drop(raw, fault["loc"])
    else:
        raise ConfigError(problems, where)
    for paths, sentence in conflicts(settings):
        if not wrong & set(paths):
            problems.append(f"{paths[0]}: {sentence}")
    if problems:
        raise ConfigError(problems, where)
    return settings


def fill_preset(raw: Raw) -> Raw:
    """Writes the preset's architecture and objective where the user gave none."""
    name = get_path(raw, "model.preset")
    preset = catalogue.PRESETS.get(name) if isinstance(name, str) else None
    if preset:
        data = raw.setdefault("data", {})
        raw["model"].setdefault("architecture", preset.architecture)
        if isinstance(data, dict):
            data.setdefault("objective", preset.objective)
    return raw


def _drop(raw: Any, location: tuple[int | str, ...]) -> None:
    """Removes the value at `location`, or the nearest thing above it that can be removed."""
    trail: list[tuple[Any, int | str]] = []
    for key in location:
        held = raw if isinstance(raw, dict) else range(len(raw) if isinstance(raw, list) else 0)
        if key in held:
            trail.append((raw, key))
            raw = trail[-1][0][key]
    for holder, key in trail[-1:]:
        del holder[key]


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with settings below it",
    "model_attributes_type": "a section with settings below it",
    "tuple_type": "a list",
    "too_short": "a list of at least one",
    "finite_number": "a finite number",
    "string_too_short": "a text that is not empty",
    "string_pattern_mismatch": "a text without control characters",
}


_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _sentence(path: str, fault: ErrorDetails) -> str:
    kind, value, given = fault["type"], fault.get("input"), fault.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_setting(path)
    if kind == "missing":
        return f"{path}: is required"
    if kind in _WANTED:
        return f"{path}: must be {_WANTED[kind]}, not {value!r}"
    if kind in ("literal_error", "unknown_name"):
        # pydantic writes a Literal's choices out: 'a', 'b' or 'c'
        choices = given.get("names") or re.findall("'([^']*)'", given["expected"])
        hint = nearest_of(value, choices)
        return f"{path}: must be one of {', '.join(choices)}, not {value!r}{hint}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{path}: must be {words} {given[bound]}, not {value!r}"
    return f"{path}: {fault['msg']}, not {value!r}"
