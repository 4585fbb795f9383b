"""How long a training step takes: the work of work.py at the speeds of hardware.yaml.

A matrix product takes its FLOPs at the product rate and, on top, its operands at the memory's
bandwidth: small or thin ones are slow because of what they move. Collectives run as rings: over
the link where the group sits in one node, else at one GPU's share of the network. Messages of data
parallelism hide behind computation in part (`_open`); tensor, context and pipeline messages do not.

    step = micro-batches x dearest rank + bubble + what data parallelism leaves open + optimizer
"""

import math
from dataclasses import dataclass, fields

from megaarch import flops
from megaarch.parallel.stages import Stages
from megaarch.planner.hardware import Constants, Gpu, hardware
from megaarch.planner.memory import micro_batches, parameters_by_rank
from megaarch.planner.order import bubble
from megaarch.planner.work import HALF, OURS, Layers, Practice, Work
from megaarch.settings import Parallel, Settings

FUSED_BACKWARD = 2.5  # fused attention computes the scores again (Dao et al. 2022, section 3.1)
OPTIMIZER_BYTES = 36  # read and written for a parameter: gradient, norm, AdamW's states, weight


@dataclass(frozen=True)
class Cluster:
    """gpus_per_node: GPUs that share a node's links."""

    gpu: Gpu
    gpus_per_node: int = 8
    constants: Constants = hardware().constants

    @property
    def memory_rate(self) -> float:
        """Bytes a second."""
        return self.gpu.bandwidth * 1e9 * self.constants.bandwidth

    def wire(self, span: int) -> float:
        """Bytes a second that a GPU sends to ranks of which the farthest is `span` - 1 away."""
        if span <= self.gpus_per_node:
            return self.gpu.link * 1e9 * self.constants.link
        return self.gpu.network * 1e9 * self.constants.network


@dataclass(frozen=True)
class Seconds:
    """A step by what it is spent on; `total` is their sum. On the dearest rank."""

    products: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0  # norms, activations, softmax, the loss
    recompute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0  # messages between stages
    bubble: float = 0.0
    data: float = 0.0  # what is not hidden behind computation
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, entry.name) for entry in fields(self))

    @property
    def limit(self) -> str:
        """What costs most besides the products."""
        names = [entry.name for entry in fields(self) if entry.name != "products"]
        return max(names, key=lambda name: getattr(self, name))


def step_seconds(settings: Settings, cluster: Cluster, practice: Practice = OURS) -> Seconds:
    """One optimizer step of settings whose layout fits (mesh.check)."""
    parallel, batches = settings.parallel, micro_batches(settings)
    ranks = _ranks(settings, cluster, practice)
    dearest = max(ranks, key=lambda rank: rank.total)
    mean = tuple(sum(costs) / len(ranks) for costs in zip(*map(_passes, ranks), strict=True))
    spent = {entry.name: getattr(dearest, entry.name) * batches for entry in fields(Seconds)}
    spent["bubble"] = bubble(parallel, batches, mean)
    sizes = parameters_by_rank(settings)
    busy, backward = sum(spent.values()), dearest.total * 2 / 3
    spent["data"] = _data(settings, cluster, max(sizes), batches, busy, backward, practice)
    shards = parallel.data_parallel_shard * parallel.context_parallel
    spent["optimizer"] = max(sizes) / shards * OPTIMIZER_BYTES / cluster.memory_rate
    return Seconds(**spent)


def model_flops(settings: Settings) -> float:
    """Exact training FLOPs of one step."""
    row = Layers(settings).row
    each = flops.training(settings.model, row.counts) / row.counts.rows
    return each * settings.training.global_batch_size


def _ranks(settings: Settings, cluster: Cluster, practice: Practice) -> list[Seconds]:
    """A micro-batch on each pipeline rank."""
    layers, parallel = Layers(settings, practice), settings.parallel
    stages = Stages.of(settings)
    span = parallel.tensor_parallel * parallel.context_parallel
    span *= parallel.data_parallel_shard * parallel.data_parallel_replicate
    known: dict[tuple, Seconds] = {}  # many stages are alike

    def stage(mine: range) -> Seconds:
        received = _received(layers, mine.start) if parallel.pipeline_parallel > 1 else 0.0
        key = (received, *layers.contents(mine))
        if key not in known:
            body, head = layers.stage(mine)
            known[key] = _add(
                _micro_batch(body, cluster, parallel, practice, body=True),
                _micro_batch(head, cluster, parallel, practice, body=False),
                Seconds(pipeline=2 * received / cluster.wire(2 * span)),
            )
        return known[key]

    return [
        _add(*(stage(stages.layers[mine]) for mine in stages.on(rank)))
        for rank in range(parallel.pipeline_parallel)
    ]


def _micro_batch(
    work: Work, cluster: Cluster, parallel: Parallel, practice: Practice, *, body: bool
) -> Seconds:
    """Forward and backward of what a stage does. body: layers, which may recompute."""
    constants, rate = cluster.constants, cluster.gpu.product * 1e12
    product = work.flops / (rate * constants.product)
    product += (
        sum(HALF * (m * n + n * k + m * k) * count for m, n, k, count in work.products)
        / cluster.memory_rate
    )
    attention = sum(
        pairs / (rate * constants.attention) * (1 + constants.attention_length / length)
        for pairs, length in work.attention
    )
    moved = work.moved / cluster.memory_rate
    span = parallel.tensor_parallel
    tensor = work.sent / cluster.wire(span)
    span *= parallel.context_parallel
    context = work.exchanged / cluster.wire(span)
    again = {
        "none": 0.0,
        "selective": moved,
        "full": product + attention + moved + tensor + context,
    }
    recompute = again[parallel.recompute] if body else practice.logits_again * product
    return Seconds(
        products=3 * product,
        attention=(1 + FUSED_BACKWARD) * attention,
        memory_bound=3 * moved,
        recompute=recompute,
        tensor=2 * tensor,
        context=2 * context,
    )


def _add(*parts: Seconds) -> Seconds:
    return Seconds(**{e.name: sum(getattr(x, e.name) for x in parts) for e in fields(Seconds)})


def _received(layers: Layers, start: int) -> float:
    """Bytes of the tensors that a stage receives: hidden states, and in a decoder the memory."""
    if start == 0:
        return 0.0
    model, streams = layers.settings.model, len(layers.row.slots)
    boundary = model.encoder_layers or model.layers
    sent = [0, 1] if streams > 1 and start > boundary else [0]
    tokens = sum(layers.tokens(stream) for stream in sent)
    return tokens * model.hidden_size * HALF / layers.settings.parallel.tensor_parallel


def _passes(rank: Seconds) -> tuple[float, float, float]:
    """A micro-batch's forward pass, and its backward pass in two: gradients of inputs, with all that
    is recomputed, and of weights."""
    messages = rank.tensor + rank.context + rank.pipeline
    attention = rank.attention / (1 + FUSED_BACKWARD)
    forward = (rank.products + rank.memory_bound) / 3 + attention + messages / 2
    weights = rank.products / 3
    return forward, rank.total - forward - weights, weights


def _data(
    settings: Settings,
    cluster: Cluster,
    parameters: float,
    batches: int,
    busy: float,
    backward: float,
    practice: Practice,
) -> float:
    """Seconds of gathering parameters and reducing gradients that computation does not hide.

    parameters: of one rank's part of the model, ahead of sharding. busy: seconds of the step
    without them. backward: of the last micro-batch.
    """
    parallel = settings.parallel
    shard = parallel.data_parallel_shard * parallel.context_parallel
    copies, span = parallel.data_parallel_replicate, parallel.tensor_parallel * shard
    pipelined, again = parallel.pipeline_parallel > 1, parallel.gathers_again
    rate = cluster.wire(span)
    ring = parameters * (shard - 1) / shard / rate
    gathers = ring * HALF
    if again or not pipelined:  # each micro-batch gives back what it has gathered
        gathers *= batches if pipelined or not again else 2 * batches
    reductions = ring * practice.gradient_bytes
    if copies > 1:
        share = parameters / shard * 2 * (copies - 1) / copies
        reductions += share * practice.gradient_bytes / cluster.wire(span * copies)
    if pipelined:  # all gradients are reduced at the end
        return _open(gathers, busy) + reductions
    if again:
        return _open(gathers + batches * reductions, busy)
    times = batches if parallel.reshard_after_forward else 1  # at the step's last micro-batch
    return _open(gathers, busy) + times * _open(reductions, backward)


def _open(messages: float, busy: float) -> float:
    """What messages add to the `busy` seconds beside which they are sent. They compete for the GPU
    and its memory and wait for each other at times: the two add up like the sides of a right
    angle, between the longer of the two and their sum."""
    return math.hypot(messages, busy) - busy
