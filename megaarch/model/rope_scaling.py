"""RoPE's frequencies for rows longer than those of pretraining."""

import math

import torch

from megaarch.config.schema import RopeScaling


def scaled(frequency: torch.Tensor, base: float, scaling: RopeScaling) -> torch.Tensor:
    """Returns the frequencies [channels / 2] that replace `frequency`, in radians a token.

    linear is position interpolation (Chen et al. 2023); llama3 is Llama 3.1's, by wavelength; yarn
    is "NTK-by-parts" (Peng et al. 2023, section 3.2). dynamic changes nothing up to its
    original_length, where rows end.
    """
    if scaling.kind == "dynamic":
        return frequency
    low = frequency / scaling.factor
    if scaling.kind == "linear":
        return low
    keeps = _llama3_share if scaling.kind == "llama3" else _yarn_share
    share = keeps(frequency, base, scaling)
    return share * frequency + (1 - share) * low


def attention_factor(scaling: RopeScaling | None) -> float:
    """Returns the factor of queries and keys: yarn's temperature (section 3.3), else 1."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def _llama3_share(frequency: torch.Tensor, base: float, scaling: RopeScaling) -> torch.Tensor:
    """Returns how much of each frequency stays, from 0 to 1: linear in its turns in original_length."""
    assert scaling.original_length is not None  # config/validate.py
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_share(frequency: torch.Tensor, base: float, scaling: RopeScaling) -> torch.Tensor:
    """Returns how much of each frequency stays, from 0 to 1: linear in its channel."""
    original_length = scaling.original_length
    assert original_length is not None  # config/validate.py
    channels = 2 * len(frequency)

    def channel(turns: float) -> float:
        length = original_length / (turns * 2 * math.pi)
        return channels * math.log(length) / (2 * math.log(base))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    last += 0.001 if first == last else 0
    index = torch.arange(len(frequency), device=frequency.device, dtype=frequency.dtype)
    return 1 - ((index - first) / (last - first)).clamp(0, 1)
