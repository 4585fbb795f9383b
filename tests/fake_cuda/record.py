"""Records what a GPU would run, under fake tensors: each kernel, each wait of the host.

with pretended(), Recorder() as recorder:
    ...
recorder.kernels
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda import operators, rates

PRODUCT, ATTENTION, COPY, OTHER = "products", "attention", "host copies", "elementwise and other"
PHASES = ("copy", "forward", "backward", "clip", "optimizer", "read")


@dataclass(frozen=True)
class Kernel:
    """What one operator runs. kind: of those above. head: whether one of its tensors has the
    vocabulary as a dimension. launches: 0 of a copy from or to the host."""

    name: str
    phase: str
    kind: str
    seconds: float
    bytes: int
    flops: float
    launches: int
    head: bool = False


class Recorder(TorchDispatchMode):
    """Enter it inside of the fake mode. phase: set by the caller; what runs in autograd's backward
    pass goes to `backward`. vocabulary: padded, to tell the head's kernels."""

    def __init__(self, vocabulary: int = 0):
        super().__init__()
        self.phase, self.vocabulary = "forward", vocabulary
        self.kernels: list[Kernel] = []
        self.waits: Counter[tuple[str, str]] = Counter()
        self._muted = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile compiles as if nothing were recorded."""
        return True

    @contextmanager
    def muted(self, on: bool = True) -> Iterator[None]:
        """What runs in the block is not recorded, if `on`."""
        before = self._muted
        self._muted = before or on
        try:
            yield
        finally:
            self._muted = before

    def fused(self, name: str, moved: int) -> None:
        """Counts a kernel that a compiler generated."""
        self._append(name, OTHER, rates.seconds(bytes=moved), moved, 0, 1)

    def now(self) -> str:
        in_backward = torch._C._current_graph_task_id() >= 0
        return "backward" if self.phase == "forward" and in_backward else self.phase

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name
        if name in operators.WAITS and _on_cuda(args):
            self.wait(name)
            if name in ("aten::_local_scalar_dense", "aten::equal"):
                return _stand_in(args[0])
        if operators.is_free(operator):
            return operator(*args, **kwargs)
        if opened := self._opened(operator, args, kwargs):
            return opened[0]
        out = operators.call(operator, args, kwargs)
        crossed = self._crossing(operator, args, kwargs, out)
        if not crossed and (_on_cuda(args) or _on_cuda(out)):
            self.add(operator, args, kwargs, out)
        return out

    def _opened(self, operator, args, kwargs) -> tuple | None:
        """Its result in a tuple, if it is run as other operators."""
        name = operator._schema.name
        if name not in operators.OPENED and not operators.is_composite(operator):
            return None
        key = (
            "CUDA" if operators.has_kernel(operator, "CUDA") else operators.composite_key(operator)
        )
        assert key is not None, f"{name} has no kernel to open"
        with self:
            return (operator._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs),)

    def _crossing(self, operator, args, kwargs, out) -> bool:
        """Whether it copies between host and device: no kernel, but maybe a wait."""
        if operator._schema.name != "aten::copy_":
            return False
        to, source = args[:2]
        if to.device.type == source.device.type:
            return False
        given = operators.bound(operator, args, kwargs)
        to_host = to.device.type == "cpu"  # pinned by torch where it does not block
        pinned = to_host or getattr(source, "pinned", False)
        way = "device to host" if to_host else "host to device"
        if not (given["non_blocking"] and pinned):
            self.wait(f"copy {way}")
        to.host_values = getattr(source, "host_values", None)
        self._append(f"copy {way}", COPY, rates.LAUNCH, operators.size(source), 0, 0)
        return True

    def add(self, operator, args, kwargs, out) -> None:
        """Counts one operator that a GPU has kernels for."""
        if self._muted:
            return
        name, given = operators.name_of(operator), operators.bound(operator, args, kwargs)
        moved, launches = operators.moved(operator, given, out), operators.launches(operator, given)
        kind, rate, flops = OTHER, rates.PRODUCTS["bfloat16"], 0.0
        if found := operators.ATTENTION.get(name):
            speed = rates.ATTENTION[found.kernel]
            kind, rate = ATTENTION, speed.backward if found.backward else speed.forward
            flops, launches = operators.attention_flops(found, given), found.launches
        elif flops := operators.products(operator, args, kwargs, out):
            operand = given.get("mat2", operators.tensors(args)[-1]).dtype  # scales may follow it
            kind, rate = PRODUCT, rates.PRODUCTS[str(operand).removeprefix("torch.")]
        seconds = rates.seconds(flops=flops, rate=rate, bytes=moved, launches=launches)
        shapes = [x.shape for x in operators.tensors((args, kwargs, out))]
        head = any(self.vocabulary in shape for shape in shapes)
        self._append(name, kind, seconds, moved, flops, launches, head)

    def _append(self, name, kind, seconds, moved, flops, launches, head=False) -> None:
        if not self._muted:
            at = self.now()
            self.kernels.append(Kernel(name, at, kind, seconds, moved, flops, launches, head))

    def wait(self, name: str) -> None:
        """Counts a wait of the host."""
        if not self._muted:
            self.waits[self.now(), name] += 1


@contextmanager
def phase(recorder: Recorder, name: str) -> Iterator[None]:
    """What runs in the block belongs to this phase."""
    before, recorder.phase = recorder.phase, name
    try:
        yield
    finally:
        recorder.phase = before


def _on_cuda(tree) -> bool:
    return any(x.device.type == "cuda" for x in operators.tensors(tree))


def _stand_in(x: torch.Tensor) -> bool | int | float:
    """What the host is told where it waits for a figure."""
    if x.dtype == torch.bool:
        return True
    return 1.0 if x.dtype.is_floating_point else 1
