"""Logits without a cache: the whole row of a prompt and its answer, in one forward pass, by the form in
which scoring would have it."""

import numpy as np
import torch

from megaarch.config import catalogue
from megaarch.data import conditional_forms
from megaarch.data.feature_converters import converter_of
from megaarch.data.packing import pack


def next_logits(model, settings, vocabulary, prefix, answer):
    """The logits [V] of the token that follows `answer` after `prefix`: those at which it is scored."""
    objective, architecture = settings.data.objective, settings.model.architecture
    scored = np.append(answer, vocabulary.pad).astype(np.int64)
    example = conditional_forms.continuation(objective, architecture, prefix, scored, vocabulary)[
        -1
    ]
    converted = converter_of(architecture)(example, vocabulary)
    axes = catalogue.position_axes(objective)
    batch = pack([[converted]], converted.shape, pad=vocabulary.pad, axes=axes, sample_index=[0])
    with torch.no_grad():
        return model.logits(batch)[0, converted.target_index[-1]]
