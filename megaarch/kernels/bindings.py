"""The compiled kernels of csrc/: found once, called with tensors, one sentence where it fails.

    csrc/cpu --setup.py--> cpu.so      csrc/cuda --setup.py, nvcc--> cuda.so

Two plain C libraries beside this file, with the same functions (csrc/megaarch.h), and those that only
the CPU needs (csrc/cpu.h): no ABI of torch is met, so that one build serves every version of it.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaarch.errors import UserError

ACTIVATIONS = {"swiglu": 0, "geglu": 1, "relu": 2, "gelu": 3, "gelu_tanh": 4}  # csrc/cpu.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "d": ctypes.c_double, "i": ctypes.c_int}
# Arguments in the headers' order, but for the stream, which all end with.
_SIGNATURES = {
    "rms_norm_forward": "ppppqqdi",
    "rms_norm_backward": "pppppppqqqi",
    "rows_take": "ppppqqqqqq",
    "rows_add": "pqpppppqqqi",
    "cross_entropy_forward": "pppppqqqi",
    "cross_entropy_backward": "pppppppqqqi",
}
_OF_CPU = {
    "heads_forward": "ppppppqqqqqi",
    "heads_backward": "pppppppqqqqqqi",
    "gated_forward": "ppqii",
    "gated_backward": "pppqii",
    "softmax_less_target": "ppppqqi",
    "attention_forward": "pppppppqqqqqqqdpppqi",
    "attention_backward": "pppppppppppqqqqqqqdppppqi",
    "decode_layers": "pqpp",
    "few_rows": "ppppqqq",
}


def obstacle(device_type: str) -> str | None:
    """Returns why the kernels cannot run on devices of this type, or None."""
    try:
        load(device_type)
    except FileNotFoundError:
        needs = "nvcc and a torch with CUDA" if device_type == "cuda" else "a C++ compiler"
        return (
            f"the kernels for {device_type} are not built: run python setup.py build_ext --inplace "
            f"in the checkout, with {needs}"
        )
    except OSError as error:
        return f"the kernels for {device_type} do not load ({error}): build them again here"
    return None


def serves(*tensors: torch.Tensor | None) -> bool:
    """Returns whether the CPU's kernels take the place of torch's operations on these, unasked: plain
    tensors, in a process that runs each operation as it comes."""
    return plain(*tensors) and not torch.compiler.is_compiling() and obstacle("cpu") is None


def plain(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = _CPU_DTYPES) -> bool:
    """Returns whether these are what the CPU's kernels read: tensors of no subclass, on a CPU, of one
    of these dtypes. None is left out."""
    return all(
        x is None or (type(x) in (torch.Tensor, nn.Parameter) and x.is_cpu and x.dtype in dtypes)
        for x in tensors
    )


@cache
def load(device_type: str) -> ctypes.CDLL:
    """Returns the library of a device's kernels. FileNotFoundError or OSError where there is none."""
    path = Path(__file__).with_name(f"{device_type}.so")
    if not path.exists():
        raise FileNotFoundError(path)
    return open_library(path, device_type)


def open_library(path: Path, device_type: str) -> ctypes.CDLL:
    """Returns a library with its functions' signatures. OSError where it lacks one."""
    library = ctypes.CDLL(str(path))
    signatures = _SIGNATURES | (_OF_CPU if device_type == "cpu" else {})
    for name, letters in signatures.items():
        try:
            function = getattr(library, f"megaarch_{name}")
        except AttributeError:
            raise OSError(f"{name} is not in {path}, which is of an earlier version") from None
        function.argtypes = [_TYPES[letter] for letter in letters + "p"]
        function.restype = ctypes.c_int
    library.megaarch_error.restype = ctypes.c_char_p
    return library


def operator(name: str, outputs: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates what runs a kernel: makes it a torch operator of this name. outputs: allocates its
    results, unwritten, from the same arguments, which is all that happens to fake tensors."""

    def register(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(f"megaarch::{name}", function, mutates_args=())
        made.register_fake(outputs)
        return made

    return register


def call(name: str, device: torch.device, *arguments: Any) -> None:
    """Runs a kernel on the device's current stream. Tensors become their addresses, dtypes their codes
    and lists of integers arrays.

    UserError where the kernels are not built; RuntimeError where one has no code for its arguments or could not
    be launched.
    """
    if reason := obstacle(device.type):
        raise UserError(f"model.fused_kernels: {reason}")
    library = load(device.type)
    given = [_as_c(x) for x in arguments]
    function = getattr(library, f"megaarch_{name}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            code = function(*given, torch.cuda.current_stream(device).cuda_stream)
    else:
        code = function(*given, None)
    if code:
        reason = library.megaarch_error(code).decode()
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        raise RuntimeError(
            f"kernel {name} on {device.type}: {reason}, given "
            f"{[list(x.shape) for x in tensors]} of "
            f"{', '.join(sorted({str(x.dtype) for x in tensors}))}"
        )


def _as_c(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return _address(argument)
    if isinstance(argument, list):
        return (ctypes.c_int64 * len(argument))(*argument)
    return DTYPES[argument] if isinstance(argument, torch.dtype) else argument


def _address(x: torch.Tensor) -> int:
    if type(x) is not torch.Tensor:
        # what a collective of torch's tensor parallelism leaves is waited for where it is first read
        from torch.distributed._functional_collectives import AsyncCollectiveTensor

        if isinstance(x, AsyncCollectiveTensor):
            x = x.wait()
    address = x.data_ptr()
    assert address or not x.numel(), f"a {type(x).__name__} without storage"
    return address


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a kernel's statistics and sums."""
    return torch.promote_types(dtype, torch.float32)
