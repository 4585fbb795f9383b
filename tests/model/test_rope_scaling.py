"""RoPE's scaled frequencies, against a second writing of them in fp64 by the papers' definitions."""

import math

import pytest
import torch

from megaarch import config
from megaarch.config.schema import RopeScaling
from megaarch.model.positions import rotary_tables, rotate

SIZE, BASE, LENGTH = 64, 10000.0, 256
KINDS = {
    "linear": {"kind": "linear", "factor": 4.0},
    "dynamic": {"kind": "dynamic", "factor": 4.0, "original_length": LENGTH},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_length": 64},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_length": 64},
    "yarn, no truncation": {
        "kind": "yarn",
        "factor": 4.0,
        "original_length": 64,
        "truncate": False,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
}


def frequency(channel, s):
    """Radians a token of a pair of channels."""
    plain = BASE ** (-2 * channel / SIZE)
    if s.kind == "dynamic":
        return plain
    if s.kind == "linear":
        return plain / s.factor
    if s.kind == "llama3":
        wavelength = 2 * math.pi / plain
        if wavelength < s.original_length / s.high_frequency_factor:
            return plain
        if wavelength > s.original_length / s.low_frequency_factor:
            return plain / s.factor
        span = s.high_frequency_factor - s.low_frequency_factor
        share = (s.original_length / wavelength - s.low_frequency_factor) / span
        return (1 - share) * plain / s.factor + share * plain
    ends = [
        SIZE * math.log(s.original_length / (2 * math.pi * turns)) / (2 * math.log(BASE))
        for turns in (s.beta_fast, s.beta_slow)
    ]
    if s.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], SIZE - 1)
    ramp = min(max((channel - low) / (high - low), 0), 1)
    return plain / s.factor * ramp + plain * (1 - ramp)


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_and_attention_factor_are_the_papers(name):
    scaling = RopeScaling(**KINDS[name])
    positions = torch.arange(LENGTH)[None, :, None]
    cos, sin = rotary_tables(positions, SIZE, BASE, torch.float32, scaling)
    speeds = torch.tensor([frequency(i, scaling) for i in range(SIZE // 2)], dtype=torch.float64)
    angle = torch.arange(LENGTH, dtype=torch.float64)[:, None] * speeds
    factor = 1.0
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or 1 + 0.1 * math.log(scaling.factor)
    expected = factor * torch.cat((angle.cos(), angle.cos()), -1)
    torch.testing.assert_close(cos[0, :, 0].double(), expected, atol=1e-4, rtol=0)
    expected = factor * torch.cat((-angle.sin(), angle.sin()), -1)
    torch.testing.assert_close(sin[0, :, 0].double(), expected, atol=1e-4, rtol=0)
    plain, _ = rotary_tables(positions, SIZE, BASE, torch.float32)
    assert torch.equal(plain, cos) == (name == "dynamic")


def test_the_gradient_knows_the_attention_factor():
    scaling = RopeScaling(kind="yarn", factor=4.0, original_length=8)
    positions = torch.arange(5)[None, :, None]
    tables = rotary_tables(positions, 8, 100.0, torch.float64, scaling)
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, tables, 1), x)
    assert x.norm() * 1.1 < rotate(x, tables, 1).norm() < x.norm() * 1.2  # 0.1·ln(4) + 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "factor: must be at least 1"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "has to be given for the kind yarn"),
        (
            {"rope_scaling": {"kind": "linear", "factor": 2.0, "original_length": 9}},
            "has no meaning for the kind linear",
        ),
        (
            {"rope_scaling": KINDS["linear"], "position_encoding": "learned"},
            "the position encoding is learned",
        ),
        ({"rope_scaling": KINDS["dynamic"], "sequence_length": 257}, "rows of at most 256 tokens"),
        (
            {"rope_scaling": KINDS["llama3"] | {"low_frequency_factor": 4.0}},
            "low_frequency_factor: must be less than high_frequency_factor",
        ),
        ({"rope_scaling": KINDS["yarn"], "rope_base": 1.0}, "rope_base: must be more than 1"),
        ({"rope_scaling": {"kind": "ntk", "factor": 2.0}}, "must be one of linear, dynamic"),
    ],
)
def test_what_cannot_stand_together_is_told(given, said):
    with pytest.raises(config.ConfigError, match=said):
        config.resolve({"model": given})
    for kind in KINDS.values():
        assert config.resolve({"model": {"rope_scaling": kind, "sequence_length": 256}})
