"""Three fault rounds; `python -m tests.distributed.fault_rounds` plays more."""

import pytest

from tests.distributed import fault_rounds


@pytest.mark.parametrize(
    "number", [3, 6, 9]
)  # t5 in fsdp2, glm in pp2, gpt in tp2; two within a save, two in the background
def test_a_run_that_is_killed_and_restarted_ends_as_the_unbroken_one(number, tmp_path):
    played = fault_rounds.play(fault_rounds.small(tmp_path), number, 0, tmp_path)
    assert played.kills and not played.faults, played
    assert played.loss == played.unbroken_loss and played.checksum == played.unbroken_checksum
