"""How fast a cluster does the parts of a step in a layout: products with their tensor-parallel messages,
fused attention, memory traffic, collectives."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megaarch.config.schema import Parallel
from megaarch.distributed.mesh import AXES, processes
from megaarch.planner.hardware import Constants, Gpu, hardware
from megaarch.planner.layer_costs import HALF, Work
from megaarch.planner.software_stacks import Software


@dataclass(frozen=True)
class Cluster:
    """gpus_per_node: GPUs that share a node's links."""

    gpu: Gpu
    gpus_per_node: int = 8
    constants: Constants = hardware().constants

    def room(self, parallel: Parallel | None = None) -> float:
        """Bytes of a GPU that tensors may take: what the reserve leaves. parallel: a layout, whose axes
        have a communicator each, as have all ranks together and those that shard parameters."""
        groups = 0
        if parallel is not None and processes(parallel) > 1:
            used = {axis for axis, name in AXES.items() if getattr(parallel, name) > 1}
            groups = 1 + len(used) + ({"cp", "dp_shard"} <= used)
        reserve = self.constants.context + groups * self.constants.communicator
        return max(0.0, self.gpu.memory - reserve) * 1e9 * (1 - self.constants.fragments)

    @property
    def memory_rate(self) -> float:
        """Bytes a second."""
        return self.gpu.bandwidth * 1e9 * self.constants.bandwidth

    def wire(self, span: int, ports: int = 1) -> float:
        """Bytes a second that a GPU sends to ranks of which the farthest is `span` - 1 away. ports: of a
        node's network that the group may use; its ring then passes through the node's links too."""
        link = self.gpu.link * 1e9 * self.constants.link
        if span <= self.gpus_per_node:
            return link
        return min(link, self.gpu.network * 1e9 * self.constants.network * ports)

    def hops(self, ranks: int, span: int) -> float:
        """Seconds that the hops of a ring of `ranks` take, whose farthest is `span` - 1 away, whatever it
        carries: a gather, or a reduction that scatters."""
        between = math.ceil(span / self.gpus_per_node) - 1
        return self._hops(ranks - 1 - between, between)

    def tree_hops(self, ranks: int, span: int) -> float:
        """Seconds that the hops of an all-reduce take: up a tree of nodes, and down."""
        nodes = math.ceil(span / self.gpus_per_node)
        return 2 * self._hops(math.ceil(ranks / nodes) - 1, math.ceil(math.log2(nodes)))

    def _hops(self, inside: int, between: int) -> float:
        return (inside * self.constants.hop + between * self.constants.network_hop) * 1e-6


class Timed(NamedTuple):
    """Seconds of one product in a forward pass, and of its tensor-parallel message that it does not
    hide, forward and backward. gathers: its message gathers its tokens. last: a layer ends with it."""

    product: float
    forward: float
    backward: float
    gathers: bool
    last: bool


@dataclass(frozen=True)
class Rates:
    """How fast one rank computes, moves and sends."""

    cluster: Cluster
    parallel: Parallel
    software: Software

    @cached_property
    def slowest(self) -> float:
        """How much longer than the mean GPU the slowest one takes, for which all wait: speeds are taken
        to be normal, and the largest of N such numbers lies sqrt(2 ln N) deviations out."""
        return 1 + self.cluster.constants.spread * math.sqrt(2 * math.log(processes(self.parallel)))

    def products(self, work: Work, *, body: bool) -> list[Timed]:
        """body: of layers, which may compute in float8; the head does not."""
        constants = self.cluster.constants
        rate, size = self.cluster.gpu.product * 1e12 * constants.product / self.slowest, HALF
        if body and self.software.float8:
            rate, size = rate * constants.float8, 1
        found = []
        for m, n, k, count, sent, gathers, last in work.products:
            moved = size * (m + n) * k + HALF * m * n
            one = 2.0 * m * n * k / rate + moved / self.cluster.memory_rate
            ahead, back = (self._exposed(sent, beside) for beside in (one, 2 * one))
            if body and gathers and self.software.overlaps_gradients:
                messages = 1 + self.software.regathers_tokens
                back = exposed(messages * self.tensor(sent), messages * one)
            found.append(Timed(count * one, count * ahead, count * back, gathers, last))
        return found

    def _exposed(self, sent: float, beside: float) -> float:
        """Seconds of a tensor-parallel message of so many bytes that a product beside it does not
        hide."""
        if not self.software.overlaps_tensor:
            return self.tensor(sent)
        # pieces go from peer to peer, without a ring's hops
        message = sent / self.cluster.wire(self.parallel.tensor_parallel)
        hidden = self.cluster.constants.overlap
        return (1 - hidden) * message + hidden * exposed(message, beside)

    def tensor(self, sent: float) -> float:
        """Seconds of one message of so many bytes to tensor-parallel peers."""
        ranks = self.parallel.tensor_parallel
        return sent / self.cluster.wire(ranks) + self.cluster.hops(ranks, ranks) * (sent > 0)

    def context(self, exchanged: float, attention: float) -> float:
        """Seconds of so many bytes to context-parallel peers, with `attention` seconds at hand."""
        span = self.parallel.tensor_parallel * self.parallel.context_parallel
        seconds = exchanged / self.cluster.wire(span)
        return exposed(seconds, attention) if self.software.ring_context else seconds

    def attention(self, work: Work) -> float:
        """Seconds of a forward pass's fused attention."""
        gpu, length = self.cluster.gpu, self.cluster.constants.attention_length
        reached = gpu.flash2 if self.software.attention == "flash2" else gpu.attention
        assert reached is not None, "stacks that use FlashAttention-2 are of GPUs with its figure"
        rate = 1e12 * reached * self.software.attention_share
        return self.slowest * sum(
            pairs / rate * (1 + length / keys) for pairs, keys in work.attention
        )

    def data(self, span: int, apart: int) -> float:
        """Bytes a second to data-parallel peers that are `apart`, the farthest `span` - 1 away. In a ring
        over nodes each of the group's GPUs in a node uses the network port beside it."""
        ports = self.cluster.gpus_per_node // apart if self.software.node_rings else 1
        return self.cluster.wire(span, max(1, ports))


def exposed(messages: float, busy: float) -> float:
    """What messages add to the `busy` seconds beside which they are sent. They compete for the GPU
    and its memory and wait for each other at times: the two add up like the sides of a right
    angle, between the longer of the two and their sum."""
    return math.hypot(messages, busy) - busy
