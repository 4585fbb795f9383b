"""A CUDA device that is not there: torch takes fake tensors for it, and nothing is launched.

It needs a CUDA build of torch, and a process that libcuda.cpp is preloaded into (`make fake-cuda`).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import fake_tensor

CAPABILITY = (9, 0)
# What NVIDIA publishes for the H200 (SXM) and for compute capability 9.0; read by torch's compiler.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 10**9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
# Autograd's threads ask for the context of each device, and of one that is none: only the largest
# number makes torch skip that question.
DEVICES = 127


def obstacle() -> str | None:
    """Why nothing can run on fake CUDA tensors in this process, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: make fake-cuda installs a build that has"
    if "libcuda.so.1" not in os.environ.get("LD_PRELOAD", ""):
        return "no stand-in of the CUDA driver is preloaded: make fake-cuda runs this with one"
    return None


@contextmanager
def pretended() -> Iterator[fake_tensor.FakeTensorMode]:
    """A fake mode in which new tensors may be on `cuda:0`, an H200 as far as torch can tell."""
    assert obstacle() is None, obstacle()
    _registered()
    answers = {
        "is_available": True,
        "is_initialized": False,
        "get_rng_state": torch.zeros(0, dtype=torch.uint8),
        "set_rng_state": None,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_name": PROPERTIES.name,
        "get_device_properties": PROPERTIES,
        "get_device_capability": CAPABILITY,
        "is_current_stream_capturing": False,
        "synchronize": None,
        "_lazy_init": None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            replaced = mock.patch.object(torch.cuda, name, _answering(answer))
            stack.enter_context(replaced)
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", _answering(None)))
        autocast = torch.amp.autocast_mode.torch.cuda.amp.common
        absent = mock.patch.object(autocast, "amp_definitely_not_available", _answering(False))
        stack.enter_context(absent)
        yield stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))


def _answering(answer):
    return lambda *args, **kwargs: answer


@cache
def _registered() -> None:
    torch._C._ensureCUDADeviceGuardSet()  # takes effect where no device is counted
    ctypes.CDLL(None).set_device_count(DEVICES)
