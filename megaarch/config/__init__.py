"""Settings: what they are, how they are read, and which of them cannot stand together."""

from megaarch.config.load import ConfigError as ConfigError
from megaarch.config.load import Raw as Raw
from megaarch.config.load import fill_preset as fill_preset
from megaarch.config.load import get_path as get_path
from megaarch.config.load import load_config as load_config
from megaarch.config.load import parse_override as parse_override
from megaarch.config.load import read_yaml as read_yaml
from megaarch.config.load import resolve as resolve
from megaarch.config.load import set_path as set_path
