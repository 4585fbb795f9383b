"""Python's garbage collector, run at known steps.

Left alone, it runs whenever enough objects have been made, which is at other moments on each rank:
in nearly every step one of many ranks pauses, and all wait for it.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 50  # steps


@contextmanager
def collected_by_hand(every: int = EVERY) -> Iterator[Callable[[int], None]]:
    """No collection inside the block but those of the function that it gives, which is to be called
    after each step with its number and collects young objects every `every` steps. What a model is
    made of is collected once here and not looked at again."""
    automatic = gc.isenabled()
    gc.collect()
    gc.disable()

    def after_step(step: int) -> None:
        if step % every == 0:
            gc.collect(1)

    try:
        yield after_step
    finally:
        if automatic:
            gc.enable()
