"""Attention: masks as parts (mask.py), one interface (attend.py), what a kernel is (kernel_interface.py), and
the table of kernels (dispatch.py)."""

from megaarch.attention.attend import attend
from megaarch.attention.bias import RelativeBias
from megaarch.attention.dispatch import KERNELS, choose, warm
from megaarch.attention.kernel_interface import AttentionInputs, Kernel
from megaarch.attention.mask import CAUSAL, FULL, UNUSED, Parts, area, causal, find_fault, full

__all__ = [
    "CAUSAL",
    "FULL",
    "KERNELS",
    "UNUSED",
    "AttentionInputs",
    "Kernel",
    "Parts",
    "RelativeBias",
    "area",
    "attend",
    "causal",
    "choose",
    "find_fault",
    "full",
    "warm",
]
