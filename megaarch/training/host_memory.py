"""The host's memory while a run trains: freed memory is kept, and garbage is collected at known steps."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 1 << 30  # bytes of one block, and at the end of the heap
EVERY = 50  # steps


def keep_freed_memory() -> None:
    """Keeps memory that a step frees for the next step, for the rest of the process. Does nothing under
    another C library than glibc.

    glibc hands a large block back to the system when it is freed, and takes it anew a step later, with
    a page fault for every 4 KiB: a tenth of a small model's step on a CPU (docs/log.md). Steps of one
    shape take the same places again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions take 32 MiB at most; were none taken, a fixed trim threshold would make it worse.
    if mallopt and (mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, 32 << 20)):
        mallopt(TRIM_THRESHOLD, KEPT)


@contextmanager
def collected_by_hand(every: int = EVERY) -> Iterator[Callable[[int], None]]:
    """No collection inside the block but those of the function that it gives, which is to be called
    after each step with its number and collects young objects every `every` steps. What a model is
    made of is collected once here and not looked at again.

    Left alone, Python's collector runs whenever enough objects have been made, which is at other
    moments on each rank: in nearly every step one of many ranks pauses, and all wait for it.
    """
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
