"""Attention: masks as parts (parts.py), one interface (attend.py), one file a kernel
(dispatch.py)."""

from megaarch.attention.attend import attend
from megaarch.attention.bias import RelativeBias
from megaarch.attention.dispatch import KERNELS, choose, warm
from megaarch.attention.parts import CAUSAL, FULL, UNUSED, Parts, area, causal, find_fault, full

__all__ = [
    "CAUSAL",
    "FULL",
    "KERNELS",
    "UNUSED",
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
