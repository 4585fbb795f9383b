import gc
import weakref

import pytest

from megaarch.training.host_memory import collected_by_hand


class Cycle:
    """Freed by the collector alone."""

    def __init__(self):
        self.me = self


@pytest.fixture
def automatic():
    was = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was else gc.disable)()


def test_cycles_are_freed_at_the_steps_that_are_asked_for(automatic):
    before = weakref.ref(Cycle())
    with collected_by_hand(every=3) as collect:
        assert before() is None
        inside = weakref.ref(Cycle())
        held = [[] for _ in range(20 * gc.get_threshold()[0])]  # would set the collector off
        for step in (1, 2):
            collect(step)
            assert inside() is not None
        collect(3)
        assert inside() is None and held
    assert gc.isenabled()


def test_the_collector_is_left_as_it_was(automatic):
    with pytest.raises(KeyError), collected_by_hand():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    with collected_by_hand():
        pass
    assert not gc.isenabled()
