"""The heap of a process that trains on a CPU: memory that a step frees stays for the next.

glibc hands a large block back to the system when it is freed, and takes it anew a step later, with a
page fault for every 4 KiB: a tenth of a small model's step (docs/log.md). Steps of one shape take
the same places again.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 1 << 30  # bytes of one block, and at the end of the heap


def keep_freed_memory() -> None:
    """For the rest of the process. Does nothing under another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older versions take 32 MiB at most; were none taken, a fixed trim threshold would make it worse.
    if mallopt and (mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, 32 << 20)):
        mallopt(TRIM_THRESHOLD, KEPT)
