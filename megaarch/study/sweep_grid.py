"""What a sweep tries on a cell (`study.tune`): a learning rate, and with it the tokens of a batch and the
encoder's share of an encoder-decoder's layers."""

from itertools import product
from typing import Any

from megaarch.config import catalogue
from megaarch.config.schema import Study, Tune

RATE, BATCH, SHARE = "training.learning_rate", "training.global_batch_tokens", "encoder_share"
# The settings that each of them decides.
DECIDES = {RATE: (RATE,), BATCH: (BATCH,), SHARE: ("model.encoder_layers", "model.decoder_layers")}
AXES = {RATE: "learning rate", BATCH: "batch", SHARE: "share of the encoder's layers"}
# One of each axis that is swept. SHARE is no setting: the layers follow from it (cells.py).
Choice = dict[str, Any]


def of_architecture(tune: Tune, architecture: str) -> list[Choice]:
    """Returns the grid of cells of an architecture: one with a single stack has no share to try."""
    stacks = len(catalogue.ARCHITECTURES[architecture].streams)
    axes = {
        RATE: tune.learning_rates,
        BATCH: tune.global_batch_tokens,
        SHARE: tune.encoder_shares if stacks > 1 else [],
    }
    swept = {name: values for name, values in axes.items() if values}
    return [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]


def holds(study: Study, size: str | None) -> bool:
    """Whether a study sweeps cells of a size."""
    return study.tune is not None and (not study.tune.sizes or size in study.tune.sizes)


def largest_grid(tune: Tune) -> list[Choice]:
    """Returns the choices of all architectures together."""
    names = catalogue.ARCHITECTURES
    return distinct([choice for name in names for choice in of_architecture(tune, name)])


def distinct(choices: list[Choice]) -> list[Choice]:
    """Returns the choices, each once, in their order."""
    return [choice for i, choice in enumerate(choices) if choice not in choices[:i]]


def decided(tune: Tune) -> set[str]:
    """Returns the settings that a sweep decides."""
    return {path for choice in largest_grid(tune) for axis in choice for path in DECIDES[axis]}


def label(choice: Choice) -> str:
    """Names a choice to a person, in a few words."""
    words = [f"{choice[RATE]:g}"]
    if BATCH in choice:
        words.append(f"{choice[BATCH]:,} tokens")
    if SHARE in choice:
        words.append(f"encoder {choice[SHARE]:.3g}")
    return " ".join(words)


def folder_name(choice: Choice) -> str:
    """Names a choice's folder."""
    forms = {RATE: "rate-{:.3g}", BATCH: "tokens-{}", SHARE: "encoder-{:.3g}"}
    return "-".join(forms[axis].format(value) for axis, value in choice.items())
