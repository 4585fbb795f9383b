"""What is alive and what is sent while a step runs on fake tensors.

A dispatch mode that sees every operation: storages count from the operation that makes them until
the last reference dies, at their size of the moment (`fully_shard` resizes them); collectives are
counted with the bytes that this rank hands in.
"""

import weakref
from collections import Counter, defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
NO_MESSAGE = ("wait_tensor", "barrier", "monitored_barrier_")


class StepTrace(TorchDispatchMode):
    """live, peak: bytes now, and at most since `mark`. messages: by axis and collective, the count
    and the bytes that this rank hands in.

    axes: names of the process groups by their ranks.
    """

    def __init__(self, axes: dict[tuple[int, ...], str]):
        super().__init__()
        self.axes = axes
        self.live = self.peak = 0
        self.messages: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_
        self._shapes_only = ShardingPropagator._fake_mode_lock
        self._counts = True

    def mark(self) -> None:
        """Forgets peaks and messages so far."""
        self.peak = self.live
        self.messages.clear()

    def __enter__(self) -> "StepTrace":
        trace, resize = self, self._resize

        def resized(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            out = resize(self, size)
            trace._see(self)
            return out

        torch.UntypedStorage.resize_ = resized
        # DTensors learn the shape of a result by running whole tensors, which are never held
        ShardingPropagator._fake_mode_lock = _Uncounted(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        ShardingPropagator._fake_mode_lock = self._shapes_only
        super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the tensors that this rank holds
        out = operator(*args, **(kwargs or {}))
        if not self._counts:
            return out
        if operator.namespace in COLLECTIVES:
            self._send(operator, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _send(self, operator: Any, args: tuple) -> None:
        name = operator._schema.name.partition("::")[2].strip("_")
        if name in NO_MESSAGE:
            return
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if name.startswith("allgather") or name in ("reduce_scatter", "alltoall_base"):
            tensors = tensors[len(tensors) // 2 :]  # outputs come first
        groups = [x for x in args if isinstance(x, str | torch.ScriptObject)]
        entry = self.messages[self._axis(groups), name]
        entry["count"] += 1
        entry["bytes"] += sum(x.numel() * x.element_size() for x in tensors)

    def _axis(self, groups: list) -> str:
        for group in groups:
            if not isinstance(group, str):
                group = distributed.ProcessGroup.unbox(group).group_name
            try:
                # an operator has the name as a plain string, which the stub does not take
                found = _resolve_process_group(group)  # pyright: ignore[reportArgumentType]
            except (RuntimeError, ValueError):
                continue  # another string: the operation of a reduction
            ranks = tuple(sorted(distributed.get_process_group_ranks(found)))
            return self.axes.get(ranks, "shared")
        return "all"


class _Uncounted(nullcontext[None]):
    """A context in which nothing counts. It can be entered again and again."""

    def __init__(self, trace: StepTrace):
        super().__init__()
        self.trace = trace

    def __enter__(self) -> None:
        self.trace._counts = False

    def __exit__(self, *error: Any) -> None:
        self.trace._counts = True
