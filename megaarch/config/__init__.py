"""Settings: what they are, how they are read, and which of them cannot stand together."""

from megaarch.config.load import (
    ConfigError,
    Raw,
    fill_preset,
    get_path,
    load_config,
    parse_override,
    read_yaml,
    resolve,
    set_path,
)

__all__ = [
    "ConfigError",
    "Raw",
    "fill_preset",
    "get_path",
    "load_config",
    "parse_override",
    "read_yaml",
    "resolve",
    "set_path",
]
