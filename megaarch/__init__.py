"""Distributed pretraining that is fair to every transformer architecture.

A notebook finds its names here (docs/python.md). Each is imported when it is first used, so that
`import megaarch` and the help of the command need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaarch.attention import Parts as Parts
    from megaarch.attention import attend as attend
    from megaarch.config import load_config as load_config
    from megaarch.inference.generate import Generator as Generator
    from megaarch.inference.generate import generate as generate
    from megaarch.ingest.prepare import prepare as prepare
    from megaarch.study.describe import count_flops as count_flops
    from megaarch.training.trainer import Trainer as Trainer
    from megaarch.training.whole_model import build_model as build_model
    from megaarch.training.whole_model import load_checkpoint as load_checkpoint

__version__ = "0.1.0"
_MODULES = {
    "Generator": "megaarch.inference.generate",
    "Parts": "megaarch.attention",
    "Trainer": "megaarch.training.trainer",
    "attend": "megaarch.attention",
    "build_model": "megaarch.training.whole_model",
    "count_flops": "megaarch.study.describe",
    "generate": "megaarch.inference.generate",
    "load_checkpoint": "megaarch.training.whole_model",
    "load_config": "megaarch.config",
    "prepare": "megaarch.ingest.prepare",
}
__all__ = ["__version__", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'megaarch' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
