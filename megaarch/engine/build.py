"""The engine that `parallel.engine` names."""

from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.engine.native import Replica


def replica_of(settings: Settings, grid: Grid) -> Replica:
    """The copy of the model that `parallel.engine` runs."""
    if settings.parallel.engine == "torch":
        return Replica(settings, grid)
    from megaarch.engine.deepspeed import ZeroReplica

    return ZeroReplica(settings, grid)
