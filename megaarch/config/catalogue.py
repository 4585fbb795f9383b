"""The study's subjects in one table: architectures, and presets that name a pair.

An architecture is a stack layout and an attention mask; an objective turns tokens into inputs and
targets; a preset is a pair of the two with a name of its own. Nothing else tells the eight models
apart. This file is data: it imports nothing from the rest of the package.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A stack layout.

    `streams` names the token streams in the order of their stacks; the last one carries the
    targets. `looks_ahead` says of each whether a token may see tokens of later positions, and
    `bidirectional_bias` whether T5's relative bias tells these later positions apart (encoders) or
    has them share the bucket of distance 0 (t5x's decoders, prefix decoders too, so that both kinds
    read one table alike). XLNet's stream sees both sides of every place, as an encoder's does.
    `objectives` are those whose examples its feature converter accepts.
    """

    name: str
    streams: tuple[str, ...]
    looks_ahead: tuple[bool, ...]
    bidirectional_bias: tuple[bool, ...]
    objectives: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class Preset:
    """A named (architecture, objective) pair.

    `positions` is the number of position axes (GLM has two). `comparable` is False where the
    model has no left-to-right conditional, so that its held-out figure is a pseudo-likelihood.
    `fills_middle` is True where the objective can state a middle given both of its sides;
    `gap_length` is True where it is then told how long the middle is, by one mask or position for
    each of its tokens.
    """

    name: str
    architecture: str
    objective: str
    source: str
    positions: int = 1
    comparable: bool = True
    fills_middle: bool = False
    gap_length: bool = False


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "causal_decoder",
            ("decoder",),
            (False,),
            (False,),
            ("full_lm", "prefix_lm", "span_corruption", "denoising", "ul2", "supervised"),
            "one stack; every token sees itself and the tokens before it",
        ),
        Architecture(
            "prefix_decoder",
            ("decoder",),
            (True,),
            (False,),
            (
                "prefix_lm",
                "span_corruption",
                "denoising",
                "blank_infilling",
                "unilm",
                "ul2",
                "supervised",
            ),
            "one stack; inputs see each other, targets see the inputs and the targets before them",
        ),
        Architecture(
            "encoder_decoder",
            ("encoder", "decoder"),
            (True, False),
            (True, False),
            ("prefix_lm", "span_corruption", "denoising", "ul2", "supervised"),
            "two stacks; a causal decoder that also attends to a bidirectional encoder",
        ),
        Architecture(
            "encoder",
            ("encoder",),
            (True,),
            (True,),
            ("masked_lm",),
            "one stack; every token sees every other",
        ),
        Architecture(
            "two_stream",
            ("decoder",),
            (True,),
            (True,),
            ("permutation_lm",),
            "one stack over content and query tokens in a factorization order",
        ),
    )
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("gpt", "causal_decoder", "full_lm", "Radford et al. 2019"),
        Preset("prefix_lm", "prefix_decoder", "prefix_lm", "Liu et al. 2018; Raffel et al. 2020"),
        Preset(
            "unilm",
            "prefix_decoder",
            "unilm",
            "Dong et al. 2019",
            fills_middle=True,
            gap_length=True,
        ),
        Preset("t5", "encoder_decoder", "span_corruption", "Raffel et al. 2020", fills_middle=True),
        Preset("bart", "encoder_decoder", "denoising", "Lewis et al. 2020", fills_middle=True),
        Preset(
            "bert",
            "encoder",
            "masked_lm",
            "Devlin et al. 2019",
            comparable=False,
            fills_middle=True,
            gap_length=True,
        ),
        Preset(
            "glm",
            "prefix_decoder",
            "blank_infilling",
            "Du et al. 2022",
            positions=2,
            fills_middle=True,
        ),
        Preset(
            "xlnet",
            "two_stream",
            "permutation_lm",
            "Yang et al. 2019",
            fills_middle=True,
            gap_length=True,
        ),
        Preset("ul2", "encoder_decoder", "ul2", "Tay et al. 2023", fills_middle=True),
    )
}

OBJECTIVES = tuple(
    dict.fromkeys(name for entry in ARCHITECTURES.values() for name in entry.objectives)
)


def position_axes(objective: str) -> int:
    """Number of position axes that examples of `objective` carry."""
    return 2 if objective == "blank_infilling" else 1
