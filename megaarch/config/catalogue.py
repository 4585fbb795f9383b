"""Tables of what a configuration can name: architectures, objectives, presets, attention kernels
and optimizers. `registry.py` says how a package outside adds to them.

An architecture is a stack layout and an attention mask; an objective turns tokens into inputs and
targets; a preset is a pair of the two with a name of its own. Nothing else tells the eight models
apart. This file is data: what stands above it is named here and imported on first use.
"""

from dataclasses import dataclass, replace
from typing import Any

from megaarch.config.registry import Registry, load
from megaarch.errors import UserError

Reference = Any  # an object, or the "module:attribute" to import it from (registry.load)


@dataclass(frozen=True)
class Architecture:
    """A stack layout.

    `streams` names the token streams in the order of their stacks; the last one carries the
    targets. `looks_ahead` says of each whether a token may see tokens of later positions, and
    `bidirectional_bias` whether T5's relative bias tells these later positions apart (encoders) or
    has them share the bucket of distance 0 (t5x's decoders, prefix decoders too, so that both kinds
    read one table alike). XLNet's stream sees both sides of every place, as an encoder's does.
    `objectives` are those whose examples its feature converter accepts, `mask` its mask's name in
    a report, `converter` a data.example.Converter.
    """

    name: str
    streams: tuple[str, ...]
    looks_ahead: tuple[bool, ...]
    bidirectional_bias: tuple[bool, ...]
    objectives: tuple[str, ...]
    summary: str
    mask: str
    converter: Reference


@dataclass(frozen=True)
class Objective:
    """A rule that makes examples of text.

    mixture: (weight, data.example.Objective) of each component, weights of sum 1, or a function of
        the settings that returns them; None where the examples are {input, target} pairs of the data
        (`supervised`).
    continuation: (prefix, scored, vocabulary) -> [Example], the form in which `scored` is scored
        after `prefix`; None: that of a middle with nothing after it.
    middle: (before, scored, after, vocabulary) -> [Example], the form in which `scored` is scored
        between its two sides; None: it cannot be stated.
    gives_spans: whether that form gives spans of what stands before, and takes their
        data.objectives.span_corruption.Spans too.
    settings: those of NOISE that it accepts.
    position_axes: of its examples' positions. comparable: False where there is no left-to-right
        conditional, so that a held-out figure is a pseudo-likelihood. gap_length: whether a middle
        is given its length, by one mask or position for each of its tokens.
    architectures: those that run it beside the ones whose own rows say so.
    ends: what ends a generated answer: names of specials, or "sentinel" (inference/prompts.py).
    learns: what a model of it does, to a reader of the report who does not know its name.
    """

    name: str
    mixture: Reference = None
    continuation: Reference = None
    middle: Reference = None
    gives_spans: bool = False
    settings: tuple[str, ...] = ()
    position_axes: int = 1
    comparable: bool = True
    gap_length: bool = False
    architectures: tuple[str, ...] = ()
    ends: tuple[str, ...] = ("eos",)
    learns: str = ""

    @property
    def of_pairs(self) -> bool:
        """Whether its examples are pairs of the data, as those of finetuning are."""
        return self.mixture is None

    def components(self, **given: Any) -> tuple[tuple[float, Any], ...]:
        """Returns the weighted components under these settings of NOISE, which go to every
        component that has them, or to the function that makes the mixture; None and False leave the
        objective's own. UserError for a setting that it does not accept, for a value that a component
        refuses, and for pairs."""
        if self.of_pairs:
            raise UserError(f"{self.name} examples are pairs of the data: they have no noise")
        given = {
            name: value for name, value in given.items() if value is not None and value is not False
        }
        for setting in given:
            if setting not in self.settings:
                raise UserError(f"objective {self.name} has no {setting}: leave it out")
        mixture: Any = load(self.mixture)
        if not isinstance(mixture, tuple):
            return mixture(**given)
        for setting, value in given.items():
            mixture = tuple(
                (weight, replace(c, **{setting: value}) if hasattr(c, setting) else c)
                for weight, c in mixture
            )
        return mixture


@dataclass(frozen=True)
class Preset:
    """A named (architecture, objective) pair. colour (light, dark scheme) and
    marker (matplotlib's): of its figures; without them it takes those of a preset that is not
    drawn."""

    name: str
    architecture: str
    objective: str
    colour: tuple[str, str] | None = None
    marker: str | None = None


@dataclass(frozen=True)
class Optimizer:
    """build: (parameter groups, Training) -> torch.optim.Optimizer. states: the fp32 numbers that
    it keeps for each parameter (adafactor: of its rows and columns alone), which memory is planned
    by."""

    name: str
    build: Reference
    states: int = 2


# settings of `data` that an objective may accept
NOISE = ("noise_density", "mean_span_length", "whole_word_masking", "max_predictions", "fim_rate")

ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    Architecture(
        "causal_decoder",
        ("decoder",),
        (False,),
        (False,),
        (
            *("full_lm", "prefix_lm", "fill_in_middle", "span_corruption", "denoising", "ul2"),
            "supervised",
        ),
        "one stack; every token sees itself and the tokens before it",
        "causal",
        "megaarch.data.feature_converters:CAUSAL_DECODER",
    ),
    Architecture(
        "prefix_decoder",
        ("decoder",),
        (True,),
        (False,),
        (
            *("prefix_lm", "fill_in_middle", "span_corruption", "denoising", "blank_infilling"),
            *("unilm", "ul2", "supervised"),
        ),
        "one stack; inputs see each other, targets see the inputs and the targets before them",
        "prefix",
        "megaarch.data.feature_converters:PREFIX_DECODER",
    ),
    Architecture(
        "encoder_decoder",
        ("encoder", "decoder"),
        (True, False),
        (True, False),
        ("prefix_lm", "span_corruption", "denoising", "ul2", "supervised"),
        "two stacks; a causal decoder that also attends to a bidirectional encoder",
        "full + causal + cross",
        "megaarch.data.feature_converters:ENCODER_DECODER",
    ),
    Architecture(
        "encoder",
        ("encoder",),
        (True,),
        (True,),
        ("masked_lm",),
        "one stack; every token sees every other",
        "full",
        "megaarch.data.feature_converters:ENCODER",
    ),
    Architecture(
        "two_stream",
        ("decoder",),
        (True,),
        (True,),
        ("permutation_lm",),
        "one stack over content and query tokens in a factorization order",
        "two streams",
        "megaarch.data.feature_converters:TWO_STREAM",
    ),
)

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    Objective(
        "full_lm",
        "megaarch.data.objectives.language_modelling:FULL_LM",
        "megaarch.data.objectives.language_modelling:continuation",
        learns="predicts each next token",
    ),
    Objective(
        "prefix_lm",
        "megaarch.data.objectives.language_modelling:PREFIX_LM",
        "megaarch.data.objectives.language_modelling:continuation",
        learns="continues a prefix",
    ),
    Objective(
        "fill_in_middle",
        "megaarch.data.objectives.fill_in_middle:mixture",
        "megaarch.data.objectives.language_modelling:continuation",
        "megaarch.data.objectives.fill_in_middle:middle",
        settings=("fim_rate",),
        learns="continues texts and fills in middles",
    ),
    Objective(
        "span_corruption",
        "megaarch.data.objectives.span_corruption:SPAN_CORRUPTION",
        middle="megaarch.data.objectives.span_corruption:middle",
        gives_spans=True,
        settings=("noise_density", "mean_span_length"),
        ends=("eos", "sentinel"),
        learns="fills in spans that were cut out",
    ),
    Objective(
        "denoising",
        "megaarch.data.objectives.denoising:DENOISING",
        middle="megaarch.data.objectives.denoising:middle",
        settings=("noise_density", "mean_span_length"),
        learns="restores a text with spans and order disturbed",
    ),
    Objective(
        "ul2",
        "megaarch.data.objectives.span_corruption:UL2",
        "megaarch.data.objectives.span_corruption:ul2_continuation",
        "megaarch.data.objectives.span_corruption:ul2_middle",
        gives_spans=True,
        learns="fills in spans and continues texts",
    ),
    Objective(
        "supervised",
        continuation="megaarch.data.objectives.language_modelling:supervised_continuation",
        learns="answers questions of tasks",
    ),
    Objective(
        "blank_infilling",
        "megaarch.data.objectives.blank_infilling:BLANK_INFILLING",
        "megaarch.data.objectives.blank_infilling:continuation",
        "megaarch.data.objectives.blank_infilling:middle",
        settings=("noise_density", "mean_span_length"),
        position_axes=2,
        ends=("eos", "eop"),
        learns="fills in blanks",
    ),
    Objective(
        "unilm",
        "megaarch.data.objectives.cloze:UNILM",
        "megaarch.data.objectives.cloze:left_to_right",
        "megaarch.data.objectives.cloze:middle",
        settings=("noise_density",),
        gap_length=True,
        learns="restores masked tokens from one side, both or a prefix",
    ),
    Objective(
        "masked_lm",
        "megaarch.data.objectives.cloze:MASKED_LM",
        "megaarch.data.objectives.cloze:one_at_a_time",
        "megaarch.data.objectives.cloze:middle",
        settings=("noise_density", "whole_word_masking", "max_predictions"),
        comparable=False,
        gap_length=True,
        learns="restores masked tokens",
    ),
    Objective(
        "permutation_lm",
        "megaarch.data.objectives.permutation:PERMUTATION_LM",
        middle="megaarch.data.objectives.permutation:middle",
        gap_length=True,
        learns="predicts tokens in a random order",
    ),
)

# Hues after Okabe and Ito (2008), darkened or lightened until text in them reads on its background;
# markers are the second channel.
PRESETS: Registry[Preset] = Registry(
    "preset",
    # Radford et al. 2019
    Preset("gpt", "causal_decoder", "full_lm", ("#0b62a8", "#6db5f2"), "o"),
    # Liu et al. 2018; Raffel et al. 2020
    Preset("prefix_lm", "prefix_decoder", "prefix_lm", ("#c84a00", "#ff9257"), "s"),
    # Dong et al. 2019
    Preset("unilm", "prefix_decoder", "unilm", ("#8f6800", "#e3b53c"), "^"),
    # Raffel et al. 2020
    Preset("t5", "encoder_decoder", "span_corruption", ("#007a5a", "#3bc9a0"), "D"),
    # Lewis et al. 2020
    Preset("bart", "encoder_decoder", "denoising", ("#b0387f", "#f08fc6"), "v"),
    # Devlin et al. 2019
    Preset("bert", "encoder", "masked_lm", ("#68717d", "#a6afbb"), "X"),
    # Du et al. 2022
    Preset("glm", "prefix_decoder", "blank_infilling", ("#0a819e", "#62d0ea"), "P"),
    # Yang et al. 2019
    Preset("xlnet", "two_stream", "permutation_lm", ("#6246b0", "#b09df8"), "h"),
    # Tay et al. 2023
    Preset("ul2", "encoder_decoder", "ul2", ("#8c2f39", "#ee8b95"), "*"),
)

# what attention/dispatch.py runs
KERNELS: Registry[Any] = Registry(
    "attention kernel",
    reference="megaarch.attention.reference:KERNEL",
    sdpa="megaarch.attention.sdpa:KERNEL",
    cpu="megaarch.attention.cpu:KERNEL",
    cudnn="megaarch.attention.cudnn:KERNEL",
    cudnn_ragged="megaarch.attention.cudnn_ragged:KERNEL",
    cudnn_flex="megaarch.attention.cudnn_flex:KERNEL",
    torch_varlen="megaarch.attention.flash:TORCH_VARLEN",
    flash2="megaarch.attention.flash:FLASH2",
    flash3="megaarch.attention.flash:FLASH3",
    flash4="megaarch.attention.flash:FLASH4",
    flex="megaarch.attention.flex:FLEX",
    flex_flash="megaarch.attention.flex:FLEX_FLASH",
)
OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    Optimizer("adamw", "megaarch.training.optimizer:adamw"),
    Optimizer("adafactor", "megaarch.training.optimizer:adafactor", states=0),
    Optimizer("sgd", "megaarch.training.optimizer:sgd", states=0),
    Optimizer("apex_adam", "megaarch.training.optimizer:apex_adam"),
)


def position_axes(objective: str) -> int:
    """Returns the number of position axes that examples of `objective` carry."""
    return OBJECTIVES[objective].position_axes


def objectives_of(architecture: str) -> tuple[str, ...]:
    """Returns the names of the objectives that the architecture runs; () for an unknown one."""
    if architecture not in ARCHITECTURES:
        return ()
    beside = (row.name for row in OBJECTIVES.values() if architecture in row.architectures)
    return (*ARCHITECTURES[architecture].objectives, *beside)
