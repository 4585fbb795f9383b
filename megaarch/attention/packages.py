"""The GPU and the optional packages that a kernel needs: each found once, and one sentence where a
package is missing or the GPU is too old for it."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch


@dataclass(frozen=True)
class Gpu:
    """capability: CUDA compute capability, (major, minor). cudnn: the version that torch loads,
    92000 for 9.20.0; 0: none. deterministic: an operation that is not must raise
    (torch.use_deterministic_algorithms without warn_only)."""

    capability: tuple[int, int]
    cudnn: int
    deterministic: bool = False


def describe(device: torch.device) -> Gpu:
    """Returns the GPU, and what torch is set to, now."""
    return Gpu(
        torch.cuda.get_device_capability(device),
        torch.backends.cudnn.version() or 0,
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@dataclass(frozen=True)
class Package:
    """A function of an optional package.

    name: of the package, for people. get: how to install it. module, attribute: where the function
    is. capability: the least CUDA compute capability, (major, minor), and the last major, if any.
    """

    name: str
    get: str
    module: str
    attribute: str
    capability: tuple[int, int] = (8, 0)
    last: int | None = None

    def load(self) -> Any:
        """Returns the function. ImportError, AttributeError or OSError where it is not to be had."""
        return getattr(import_module(self.module), self.attribute)

    def obstacle(self, device: torch.device) -> str | None:
        """Returns why it cannot run on this device, or None."""
        missing = _missing(self)
        if missing or device.type != "cuda":
            return missing
        has = describe(device).capability
        if self.capability <= has and (self.last is None or has[0] <= self.last):
            return None
        upto = "" if self.last is None else f" up to {self.last}.x"
        least = ".".join(map(str, self.capability))
        return f"{self.name} needs compute capability {least}{upto}, not {has[0]}.{has[1]}"


@cache
def _missing(package: Package) -> str | None:
    try:
        package.load()
    except ModuleNotFoundError as error:
        return f"{package.name} is not installed (no module {error.name!r}): {package.get}"
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"{package.name} is installed and does not load ({reason}): {package.get}"
    return None
