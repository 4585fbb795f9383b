"""Being told to stop: the step is finished, the run saved, and it continues as if unbroken."""

import os
import signal

import pytest
import torch

from megaarch.training.faults import Stopped, Watch
from megaarch.training.trainer import Trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(number, tiny, prepared, tmp_path):
    whole = Trainer(tiny(logging__directory=str(tmp_path / "whole")), prepared)
    whole.run()
    before = signal.getsignal(number)
    stopped = Trainer(tiny(), prepared)
    stopped.watch = lambda step: step.progress.step == 3 and os.kill(os.getpid(), number)
    with pytest.raises(Stopped, match="saved at step 3"):
        stopped.run()
    assert signal.getsignal(number) is before
    again = Trainer(tiny(), prepared)
    assert again.progress.step == 3
    again.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Watch() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
