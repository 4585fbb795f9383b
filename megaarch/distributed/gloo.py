"""Gloo's process groups, each with one thread for its collectives.

torch gives a group two. Both write the name of the collective that ended last, without a lock
(`ProcessGroupGloo::runLoop`, torch 2.13): two that end in the same instant free one string twice, and later
the process dies in malloc. The collectives of a group have one order, so that a second thread gains little.
"""

import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo
from torch.distributed.constants import default_pg_timeout

_connect: Any = ProcessGroupGloo.__init__


def use_one_thread() -> None:
    """Gives one thread to each group that this process makes from now on, those that torch makes included."""
    ProcessGroupGloo.__init__ = _with_one_thread  # pyright: ignore[reportAttributeAccessIssue]


def _with_one_thread(
    group: ProcessGroupGloo, *given: Any, timeout: timedelta = default_pg_timeout
) -> None:
    """given: store, rank and size. What a caller adds to them, options or a time, is passed on as it is."""
    _connect(group, *given, *([_options(timeout)] if len(given) == 3 else []))


def _options(timeout: timedelta) -> Any:
    """Those that torch would take but for the number of threads."""
    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    names = filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))
    devices = [ProcessGroupGloo.create_device(interface=name) for name in names]
    options._devices = devices or [ProcessGroupGloo.create_default_device()]
    options._threads, options._timeout = 1, timeout
    return options
