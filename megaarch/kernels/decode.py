"""Layers of a decoder on a few new tokens over their cache, a step of generation in one call on a CPU;
and the product of few rows. Without gradients, in fp32: what one token costs is reading the weights
once, and of a small model the Python between thirty operations a layer.

Letters of shapes: docs/shapes.md.
"""

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_double, c_int64, c_void_p

import numpy as np
import torch
from torch import nn

from megaarch.kernels.bindings import call, obstacle

DTYPES = (torch.float32,)  # that the kernels read
FEW = 16  # rows; a library's product is the faster of more (docs/log.md)


class Parameters(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]

    @classmethod
    def of(cls, module: nn.Module) -> "Parameters":
        """Returns the addresses of a norm's or linear layer's parameters."""
        return cls(**{name: x.data_ptr() for name, x in module.named_parameters()})


class Layer(Structure):
    """A layer's parameters and cache; csrc/cpu.h says what each is."""

    _fields_ = [
        ("attention_norm", Parameters),
        ("qkv", Parameters),
        ("output", Parameters),
        ("cross_norm", Parameters),
        ("cross_query", Parameters),
        ("cross_output", Parameters),
        ("feed_forward_norm", Parameters),
        ("up", Parameters),
        ("down", Parameters),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("memory_keys", c_void_p),
        ("memory_values", c_void_p),
    ]


_NUMBERS = (
    "tokens width heads key_heads size feed_forward axes slots pre_norm layer_norm activation reach "
    "memory_row memory_key memory_head"
)
_ADDRESSES = "row slot first end memory_end cos sin bias positions key_positions"


class Step(Structure):
    """A step's sizes and tokens; csrc/cpu.h says what each is."""

    _fields_ = [
        *((name, c_int64) for name in _NUMBERS.split()),
        ("epsilon", c_double),
        ("scale", c_double),
        *((name, c_void_p) for name in _ADDRESSES.split()),
    ]

    def __init__(self, **numbers: float):
        super().__init__(**numbers)
        self.alive: dict[str, torch.Tensor] = {}

    def point(self, **arrays: np.ndarray | torch.Tensor) -> None:
        """Has addresses be those of integer arrays, as int64, and of fp32 or int64 tensors, which it keeps
        alive."""
        for name, x in arrays.items():
            x = torch.as_tensor(x, dtype=torch.int64) if isinstance(x, np.ndarray) else x
            x = self.alive[name] = x.contiguous()
            setattr(self, name, x.data_ptr())


def run(layers: Sequence[Layer], step: Step, x: torch.Tensor) -> None:
    """Runs layers on x [tokens, D], in place. What the structures point to must be alive."""
    held = (Layer * len(layers))(*layers)
    call("decode_layers", x.device, ctypes.addressof(held), len(layers), ctypes.addressof(step), x)


def may_run() -> bool:
    """Returns whether the kernels run now: built, in a process that neither records gradients nor looks
    at each operation (a FLOP counter does)."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and obstacle("cpu") is None
    )


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As torch.nn.functional.linear, of `plain` tensors of DTYPES."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    sizes = (out.numel() // max(weight.shape[0], 1), *weight.shape)
    call("few_rows", x.device, x, weight, bias, out, *sizes)
    return out
