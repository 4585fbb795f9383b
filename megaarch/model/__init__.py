"""The model room: one plain-PyTorch transformer for all architectures; it knows no parallelism."""

from megaarch.model.initialize import initialize
from megaarch.model.loss import TargetLosses
from megaarch.model.transformer import Transformer, padded_vocabulary, stacks

__all__ = ["TargetLosses", "Transformer", "initialize", "padded_vocabulary", "stacks"]
