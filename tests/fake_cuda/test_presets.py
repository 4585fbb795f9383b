"""A whole training step of each preset at 1.3 billion parameters: it runs without mixed devices, waits
for the device once, for its figures, and costs no more than ceilings.yaml says."""

import pytest

from megaarch.config import catalogue
from tests.fake_cuda import ceilings, device

pytestmark = pytest.mark.skipif(device.obstacle() is not None, reason=str(device.obstacle()))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("preset", catalogue.PRESETS)
def test_a_step_stays_under_its_ceilings(measured, preset, mode):
    assert not ceilings.above(measured(preset, mode), ceilings.read()[mode][preset])


@pytest.mark.parametrize("preset", catalogue.PRESETS)
def test_half_of_the_gpu_does_counted_work(measured, preset):
    """As a user gets it by default: bf16, compiled; at the rates of rates.py."""
    found = measured(preset, "compiled")
    assert found["mfu"] >= (0.50 if preset in ("gpt", "prefix_lm", "bert") else 0.47)
    assert found["kernels"] < 2500


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("preset", catalogue.PRESETS)
def test_a_step_waits_for_its_figures_alone(measured, preset, mode):
    """Which the trainer reads once the next step is launched."""
    assert measured(preset, mode)["waits"] == {"read: event": 1}
