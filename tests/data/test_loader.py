"""The loader's defaults for each device. What batches hold is tested in test_rows.py."""

import pytest
import torch

from megaarch.data import loader
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps, prefetch


@pytest.fixture
def steps(tiny, prepared):
    settings = tiny("t5")
    rows = Rows(settings.model, settings.data, prepared, 0)
    return Steps(rows, global_batch_size=4, micro_batch_size=2)


@pytest.mark.parametrize(
    "device, given, workers, pinned",
    [("cpu", None, 0, False), ("cuda", None, 4, True), ("cuda", 0, 0, True), ("cpu", 3, 3, False)],
)
def test_a_gpu_gets_batches_ahead_and_pinned(device, given, workers, pinned, steps, monkeypatch):
    asked = {}

    class Recorded(Exception):
        pass

    def record(*_, **options):
        asked.update(options)
        raise Recorded

    monkeypatch.setattr(loader, "DataLoader", record)
    steps.device_type = device
    with pytest.raises(Recorded), prefetch(steps, 0, given):
        pass
    assert asked["num_workers"] == workers and asked["pin_memory"] == pinned


def test_pinning_a_batch_pins_all_of_its_tensors(steps, monkeypatch):
    (batch, _), pins = steps[0], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pins.append(x) or x.clone())
    pinned = batch.pin_memory()
    held = [x for part in (batch, *batch.streams) for x in vars(part).values()]
    tensors = [x for x in held if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 9 and {id(x) for x in pins} == {id(x) for x in tensors}
    assert torch.equal(pinned.streams[0].tokens, batch.streams[0].tokens)
    assert pinned.streams[0].tokens is not batch.streams[0].tokens
    assert pinned.streams[0].parts is batch.streams[0].parts and pinned.counts == batch.counts
