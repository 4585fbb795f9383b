"""torch.compile on fake CUDA tensors: its code is generated, read and not launched.

    dynamo, AOT autograd -> inductor (lowering, fusion, code) -> its plan is kept, its code is dropped
    a call: the plan's fused kernels are recorded, and the graph runs operator by operator for its
    outputs; of these operators only those that inductor leaves to a library are recorded

So `torch.compile` works as a user calls it, and its account has the kernels that inductor makes.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx

from tests.fake_cuda import device
from tests.fake_cuda.record import Recorder

# Nothing of another run is taken, constants are not computed on the device before the code, and
# Triton keeps what it compiles.
CONFIGURATION = {
    "fx_graph_cache": False,
    "compile_threads": 1,
    "joint_graph_constant_folding": False,
    "use_static_cuda_launcher": False,
}


@dataclass(frozen=True)
class Fused:
    """A kernel that inductor generates: what its loops read and write, each buffer once."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A compiled graph. extern: nodes of the graph that a library runs. code: Python and Triton."""

    fused: tuple[Fused, ...]
    extern: frozenset[str]
    code: str


class Stopped(Exception):
    """The code of a graph is there."""


class Compiler:
    """In place of inductor's last stage. `recorder`: who records what compiled graphs run."""

    def __init__(self):
        self.recorder: Recorder | None = None
        self.plans: list[Plan] = []

    def compile(self, graph: fx.GraphModule, inputs: Sequence[Any], **options):
        """As torch._inductor.compile_fx.compile_fx_inner, without a launch."""
        from torch._inductor import compile_fx
        from torch._inductor.graph import GraphLowering

        made: list[Plan] = []

        def stop(lowering):
            made.append(plan_of(lowering))
            raise Stopped

        with mock.patch.object(GraphLowering, "compile_to_module", stop), no_tensors():
            try:
                compile_fx.compile_fx_inner(graph, inputs, **options)
            except Exception:
                if not made:
                    raise
        assert made, "inductor took a graph without generating code"
        self.plans += made
        return self._callable(graph, made[0])

    def _callable(self, graph: fx.GraphModule, plan: Plan):
        def run(args):
            given = list(args)
            args.clear()
            if self.recorder is None:
                return graph.forward(*given)
            for kernel in plan.fused:
                self.recorder.fused(kernel.name, kernel.bytes)
            return Replay(graph, plan.extern, self.recorder).run(*given)

        run._boxed_call = True
        return run


class Replay(fx.Interpreter):
    """Runs a graph for its outputs; only nodes in `extern` are recorded."""

    def __init__(self, graph: fx.GraphModule, extern: frozenset[str], recorder: Recorder):
        super().__init__(graph, garbage_collect_values=True)
        self.extern, self.recorder = extern, recorder

    def run_node(self, node: fx.Node) -> Any:
        with self.recorder.muted(node.name not in self.extern):
            return super().run_node(node)


def plan_of(lowering) -> Plan:
    """What inductor has planned for a graph: called in place of loading the code."""
    from torch._inductor import ir, scheduler
    from torch._inductor.utils import get_fused_kernel_name

    code, *_ = lowering.codegen()
    fused, extern = [], set()
    for node in lowering.scheduler.nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode):
            continue
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            if not isinstance(node.node, ir.MultiOutput):
                extern.add(_origin(node.node).name)
            continue
        name = get_fused_kernel_name(node.get_nodes(), "original_aten")
        fused.append(Fused(f"triton {name}", int(node.get_read_write_buffers_sizes())))
    return Plan(tuple(fused), frozenset(extern), getattr(code, "value", code))


def _origin(kernel) -> fx.Node:
    """The node of the graph that a library's kernel runs; one of several outputs has no single one."""
    found = kernel.get_origin_node()
    if found is None:
        (found,) = (x for x in kernel.origins if x.target is kernel.op_overload)
    return found


def no_tensors():
    """Inductor traces its patterns on real tensors, of the CPU where there is no CUDA."""
    return mock.patch.object(torch.cuda, "is_available", lambda: False)


@contextmanager
def stand_in() -> Iterator[Compiler]:
    """torch.compile generates code for the pretended device, by a compiler that launches nothing."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx
    from torch._inductor import config as inductor_config
    from torch._inductor.runtime import triton_helpers

    compiler, whole = Compiler(), compile_fx.compile_fx

    def compile(model, inputs, inner_compile=None, **options):
        with no_tensors():
            return whole(model, inputs, inner_compile=compiler.compile, **options)

    def constant(answer):
        return staticmethod(lambda *args, **kwargs: answer)

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_compute_capability": 90,
        "get_device_properties": device.PROPERTIES,
        "synchronize": None,
    }
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(compile_fx, "compile_fx", compile))
        for name, answer in answers.items():
            enter(mock.patch.object(CudaInterface, name, constant(answer)))
        worker = CudaInterface.Worker
        enter(mock.patch.object(worker, "get_device_properties", constant(device.PROPERTIES)))
        enter(mock.patch.object(worker, "current_device", constant(0)))
        enter(functorch_config.patch({"enable_autograd_cache": False}))
        enter(inductor_config.patch(CONFIGURATION))
        enter(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        enter(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.callback(torch._dynamo.reset)
        yield compiler


class Driver:
    """Triton's view of the pretended device."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * device.CAPABILITY[0] + device.CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, index: int = 0) -> int:
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_capability(self, *args) -> tuple[int, int]:
        return device.CAPABILITY

    class utils:
        @staticmethod
        def get_device_properties(index: int) -> dict[str, int]:
            p = device.PROPERTIES
            return {
                "max_shared_mem": p.shared_memory_per_block_optin,
                "multiprocessor_count": p.multi_processor_count,
                "warpSize": p.warp_size,
                "max_num_regs": p.regs_per_multiprocessor,
            }
