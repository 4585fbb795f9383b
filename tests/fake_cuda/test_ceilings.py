"""The ceilings cover every preset, and a figure above its own is named."""

import pytest

from megaarch.config import catalogue
from tests.fake_cuda import ceilings

FOUND = {"kernels": 100, "bytes": 5e9, "graphs": 2, "waits": {"copy: x": 1}}
CEILING = {"kernels": 100, "gigabytes": 5, "graphs": 2, "waits": {"copy: x": 1}}


def test_every_preset_has_its_ceilings():
    found = ceilings.read()
    for mode in ("eager", "compiled"):
        assert set(found[mode]) == set(catalogue.PRESETS)
        assert all(set(ceiling) == set(CEILING) for ceiling in found[mode].values())


def test_what_is_at_its_ceiling_passes():
    assert ceilings.above(FOUND, CEILING) == []


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"kernels": 101}, "kernels"),
        ({"bytes": 5.1e9}, "gigabytes"),
        ({"graphs": 3}, "graphs"),
        ({"waits": {"copy: x": 2}}, "copy: x"),
        ({"waits": {"copy: x": 1, "forward: aten::equal": 1}}, "forward: aten::equal"),
    ],
)
def test_what_is_above_its_ceiling_is_named(more, named):
    (sentence,) = ceilings.above(FOUND | more, CEILING)
    assert sentence.startswith(f"{named}: ")
