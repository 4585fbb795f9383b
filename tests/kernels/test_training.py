"""The kernels in a model: the same losses and gradients as with torch's, for every architecture."""

from dataclasses import replace

import pytest
import torch

from megaarch.attention import KERNELS
from megaarch.config import catalogue
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.kernels import bindings
from megaarch.model import initialize
from megaarch.parallel.parallelize import build_model
from tests.attention import emulation
from tests.attention.emulation import StandIn
from tests.kernels.problems import REASON, off

pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
FUSED = ["rms_norm", "rows", "cross_entropy"]


@pytest.fixture
def varlen(monkeypatch):
    """A variable-length kernel, which is what moves rows, on the CPU."""
    options = {"devices": ("cpu",), "head_sizes": (256, 1), "dtypes": (torch.float32,)}
    stand_in = StandIn(emulation.flash_attn_2)
    monkeypatch.setitem(KERNELS, "flash2", replace(KERNELS["flash2"], package=stand_in, **options))


def gradients(settings, prepared):
    """The losses and all gradients."""
    rows = Rows(settings.model, settings.data, prepared, 0)
    fused = "rows" in settings.model.fused_kernels
    steps = Steps(rows, global_batch_size=4, micro_batch_size=4, kernel="flash2", fused_rows=fused)
    (batch,) = steps[0]
    model = build_model(settings.model, settings.data.objective)
    initialize(model, 0)
    losses = model(batch)
    (losses.nll + 1e-2 * losses.log_partition.square()).mul(batch.target_weights).sum().backward()
    return losses[:2], [p.grad for p in model.parameters()]


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("preset", ["prefix_lm", "t5", "xlnet"])
def test_a_step_is_the_same(tiny, prepared, preset, monkeypatch):
    options = {"model__attention": "flash2", "model__target_length": 24}
    if catalogue.PRESETS[preset].architecture != "encoder_decoder":
        del options["model__target_length"]
    found_losses, found = gradients(tiny(preset, model__fused_kernels=FUSED, **options), prepared)
    monkeypatch.setattr(bindings, "obstacle", lambda _: "torch, for comparison")
    losses, wanted = gradients(tiny(preset, **options), prepared)
    assert off(found_losses, losses) < 1e-6
    assert off(found, wanted) < 1e-6
