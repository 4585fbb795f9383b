"""Objectives: pure functions that turn a row of tokens into an Example. One file a family: the rule,
the bound on its lengths, and the conditional forms in which held-out text is scored.

An objective may be a mixture. Its components have raw lengths of their own, so the loader draws
the component of a sample, by weight, and then calls it. `config/catalogue.py` lists them.
"""

from megaarch.data.objectives.blank_infilling import (
    SentenceInfilling,
    SpanInfilling,
    SuffixInfilling,
)
from megaarch.data.objectives.cloze import MaskedLM, UniLM
from megaarch.data.objectives.denoising import Denoising
from megaarch.data.objectives.fill_in_middle import FillInMiddle
from megaarch.data.objectives.language_modelling import FullLM, PrefixLM, supervised
from megaarch.data.objectives.permutation import PermutationLM
from megaarch.data.objectives.span_corruption import SequentialDenoising, SpanCorruption

__all__ = [
    "Denoising",
    "FillInMiddle",
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
    "supervised",
]
