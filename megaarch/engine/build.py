"""The engine that `parallel.engine` names."""

from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.engine.base import Engine
from megaarch.engine.native import NativeEngine


def build_engine(settings: Settings, grid: Grid) -> Engine:
    """Returns the engine that `parallel.engine` names, with its model built."""
    if settings.parallel.engine == "torch":
        return NativeEngine(settings, grid)
    from megaarch.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(settings, grid)
