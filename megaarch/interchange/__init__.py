"""The interchange room: weights and settings between megaarch and Hugging Face.

It maps names and layouts of plain tensors, and needs no `transformers`.
"""

from megaarch.interchange.huggingface import FAMILIES, from_hf, settings_from, to_hf

__all__ = ["FAMILIES", "from_hf", "settings_from", "to_hf"]
