"""The interchange room: weights and settings between megaarch and other formats.

The maps of names and layouts work on plain tensors and need no `transformers`.
"""

from megaarch.interchange.families import FAMILIES
from megaarch.interchange.hf_config import config_for, family_of, settings_from
from megaarch.interchange.hf_weights import from_hf, settle, to_hf

__all__ = ["FAMILIES", "config_for", "family_of", "from_hf", "settings_from", "settle", "to_hf"]
