"""Attention: masks as parts (mask.py), one interface (attend.py), what a kernel is (kernel_interface.py), and
the table of kernels (dispatch.py)."""

from megaarch.attention.attend import attend
from megaarch.attention.bias import RelativeBias
from megaarch.attention.dispatch import KERNELS, choose, warm
from megaarch.attention.kernel_interface import AttentionInputs, Kernel
from megaarch.attention.mask import CAUSAL, FULL, Parts, causal, full

__all__ = [
    "CAUSAL",
    "FULL",
    "KERNELS",
    "AttentionInputs",
    "Kernel",
    "Parts",
    "RelativeBias",
    "attend",
    "causal",
    "choose",
    "full",
    "warm",
]
