"""What a run computes stays what it was: losses, norms and checkpoints of five recorded steps."""

import json

import pytest

from tests.conftest import PRESETS
from tests.distributed import golden

RECORD = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_five_steps_of_every_preset_are_those_recorded(layout, raw, prepared, pool, tmp_path):
    wanted = RECORD["runs"][layout]
    assert set(wanted) == set(PRESETS)
    found = golden.measure(raw, list(PRESETS), layout, pool, tmp_path)
    if golden.place() == RECORD["place"]:
        assert found == wanted  # to the last bit
        return
    for preset, run in found.items():
        for kind in ("losses", "norms", "weight_norm"):
            assert run[kind] == pytest.approx(wanted[preset][kind], rel=1e-4), (preset, kind)
