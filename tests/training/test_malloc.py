"""What is freed stays: in a process of its own, for it cannot be taken back."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import resource, sys, torch
from megaarch.training.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(48 << 18).fill_(1)  # 48 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_taken_again_without_page_faults():
    def faults(kept: str) -> list[int]:
        command = [sys.executable, "-c", PROGRAM, kept]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [int(x) for x in done.stdout.split()]

    pages = (48 << 20) // 4096
    assert faults("kept")[-1] < 0.1 * pages < min(faults("not"))
