"""The interchange room: weights and settings between megaarch and other formats.

The maps of names and layouts work on plain tensors and need no `transformers`.
"""

from megaarch.interchange.configs import config_for, family_of, settings_from
from megaarch.interchange.huggingface import FAMILIES, from_hf, to_hf
from megaarch.interchange.ties import settle

__all__ = ["FAMILIES", "config_for", "family_of", "from_hf", "settings_from", "settle", "to_hf"]
