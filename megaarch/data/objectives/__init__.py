"""Objectives: pure functions that turn a row of tokens into an Example. One file a family.

An objective may be a mixture. Its components have raw lengths of their own, so the loader draws
the component of a sample, by weight, and then calls it.
"""

from dataclasses import replace

from megaarch.data.example import Objective
from megaarch.data.objectives.blank_infilling import (
    SentenceInfilling,
    SpanInfilling,
    SuffixInfilling,
)
from megaarch.data.objectives.cloze import MaskedLM, UniLM
from megaarch.data.objectives.denoising import Denoising
from megaarch.data.objectives.language_modelling import FullLM, PrefixLM, supervised
from megaarch.data.objectives.permutation import PermutationLM
from megaarch.data.objectives.span_corruption import UL2, SequentialDenoising, SpanCorruption
from megaarch.errors import UserError

__all__ = [
    "MIXTURES",
    "Denoising",
    "FullLM",
    "MaskedLM",
    "PermutationLM",
    "PrefixLM",
    "SentenceInfilling",
    "SequentialDenoising",
    "SpanCorruption",
    "SpanInfilling",
    "SuffixInfilling",
    "UniLM",
    "build",
    "supervised",
]

MIXTURES: dict[str, tuple[tuple[float, Objective], ...]] = {
    "full_lm": ((1.0, FullLM()),),
    "prefix_lm": ((1.0, PrefixLM()),),
    "span_corruption": ((1.0, SpanCorruption()),),
    "masked_lm": ((1.0, MaskedLM()),),
    "denoising": ((1.0, Denoising()),),
    "permutation_lm": ((1.0, PermutationLM()),),
    "ul2": UL2,
    "unilm": (
        (1 / 3, UniLM("bidirectional")),
        (1 / 3, UniLM("seq2seq")),
        (1 / 6, UniLM("left_to_right")),
        (1 / 6, UniLM("right_to_left")),
    ),
    "blank_infilling": (
        (0.5, SpanInfilling()),
        (0.3, SentenceInfilling()),
        (0.2, SuffixInfilling()),
    ),
}


def build(
    name: str,
    *,
    noise_density: float | None = None,
    mean_span_length: float | None = None,
    whole_word: bool = False,
    max_predictions: int | None = None,
) -> tuple[tuple[float, Objective], ...]:
    """The weighted components of an objective; weights sum to 1.

    noise_density: share of the tokens (denoising: words) that is noise; mean_span_length: in
    tokens (denoising: words); None is the objective's own. They go to every component that has
    such a setting. ValueError for an unknown name or a setting that the objective does not have.
    """
    if name == "supervised":
        raise UserError("supervised examples are pairs, made by `supervised`: they have no noise")
    if name not in MIXTURES:
        raise UserError(f"no objective named {name!r}: choose one of {', '.join(MIXTURES)}")
    mixture = MIXTURES[name]
    given = {
        "noise_density": noise_density,
        "mean_span_length": mean_span_length,
        "whole_word": whole_word or None,
        "max_predictions": max_predictions,
    }
    for setting, value in given.items():
        if value is None:
            continue
        if name == "ul2" or not any(hasattr(component, setting) for _, component in mixture):
            raise UserError(f"objective {name} has no {setting}: leave it out")
        mixture = tuple(
            (weight, replace(c, **{setting: value}) if hasattr(c, setting) else c)
            for weight, c in mixture
        )
    return mixture
