"""How long a training step takes: the work of layer_costs.py at the rates of hardware_rates.py.

A matrix product takes its FLOPs at the product rate and, on top, its operands at the memory's
bandwidth: small or thin ones are slow because of what they move. Collectives run as rings. Messages
of data parallelism hide behind computation in part (`exposed`), those of tensor and context
parallelism and between stages where the software says so.

    step = micro-batches x slowest rank + bubble + what data parallelism leaves open + optimizer
"""

import math
from dataclasses import dataclass, replace
from functools import cache

from megaarch.config.schema import Settings
from megaarch.model import flops
from megaarch.model.transformer import stacks
from megaarch.parallel.stages import Stages
from megaarch.planner.hardware_rates import Cluster, Rates, exposed
from megaarch.planner.layer_costs import HALF, Layers, Work
from megaarch.planner.memory import micro_batches, parameters_by_rank
from megaarch.planner.pipeline_bubble import bubble
from megaarch.planner.software_stacks import Software, ours

FUSED_BACKWARD = 2.5  # fused attention computes the scores again (Dao et al. 2022, section 3.1)
OPTIMIZER_BYTES = 40  # read and written for a parameter: norm 4, clipping 8, AdamW 28


@dataclass(frozen=True)
class Seconds:
    """A step by what it is spent on; `total` is their sum. On the slowest rank. Of messages, what
    nothing hides."""

    products: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0  # norms, activations, softmax, the loss
    launches: float = 0.0
    recompute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0  # messages between stages
    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def limit(self) -> str:
        """What costs most besides the products."""
        others = {name: spent for name, spent in vars(self).items() if name != "products"}
        return max(others, key=lambda name: others[name])


def step_seconds(settings: Settings, cluster: Cluster, software: Software | None = None) -> Seconds:
    """One optimizer step of settings whose layout fits (validate.check). software: this project's."""
    software = software or ours(settings)
    parallel, batches = settings.parallel, micro_batches(settings)
    rates = Rates(cluster, parallel, software)
    ranks = _ranks(settings, rates)
    slowest = max(ranks, key=lambda rank: rank.total)
    forward, inputs, weights = (
        sum(costs) / len(ranks) for costs in zip(*map(_passes, ranks), strict=True)
    )
    spent = {name: seconds * batches for name, seconds in vars(slowest).items()}
    spent["bubble"] = bubble(parallel, batches, (forward, inputs, weights))
    sizes = parameters_by_rank(settings)
    busy, backward = sum(spent.values()), slowest.total * 2 / 3
    layers = sum(len(stack.layers) for stack in stacks(settings.model))
    units = math.ceil(layers / parallel.pipeline_parallel) + 1  # sharded one by one; 1: the rest
    spent["data"] = _data(rates, max(sizes), units, batches, busy, backward)
    shards = parallel.data_parallel_shard * parallel.context_parallel
    spent["optimizer"] = max(sizes) / shards * OPTIMIZER_BYTES / cluster.memory_rate
    return Seconds(**spent)


def model_flops(settings: Settings) -> float:
    """Exact training FLOPs of one step."""
    counts = Layers(settings).counts
    each = flops.training(settings.model, counts) / counts.rows
    return each * settings.training.global_batch_size


def _ranks(settings: Settings, rates: Rates) -> list[Seconds]:
    """A micro-batch on each pipeline rank."""
    layers, parallel = Layers(settings, rates.software), settings.parallel
    stages = Stages.of(settings)
    span = parallel.tensor_parallel * parallel.context_parallel * parallel.data_ranks

    @cache  # many stages are alike
    def stage(received: float, contents: tuple[tuple[tuple[int, bool], ...], bool]) -> Seconds:
        body, head = layers.stage(*contents)
        again = rates.software.logits_again and layers.logits_again()
        found = _add(_micro_batch(body, rates), _micro_batch(head, rates, again))
        messages = 2 * received / rates.cluster.wire(2 * span)
        if rates.software.overlaps_pipeline:
            messages = exposed(messages, found.total)
        return replace(found, pipeline=messages)

    each = [stage(layers.received(mine.start), layers.contents(mine)) for mine in stages.layers]
    return [
        _add(*(each[index] for index in stages.on(rank)))
        for rank in range(parallel.pipeline_parallel)
    ]


def _micro_batch(work: Work, rates: Rates, logits_again: float | None = None) -> Seconds:
    """Forward and backward of what a stage does. logits_again: of the head, the share that its backward
    pass computes again; None: layers, which may recompute."""
    software, constants = rates.software, rates.cluster.constants
    body = logits_again is None
    products = rates.products(work, body=body)
    product = sum(each.product for each in products)
    ahead, back = (
        rates.tensor(work.sent) + sum(getattr(each, way) for each in products)
        for way in ("forward", "backward")
    )
    attention = rates.attention(work)
    context = rates.context(work.exchanged, attention)
    forward = work.moved.forward / rates.cluster.memory_rate
    backward = work.moved.backward / rates.cluster.memory_rate
    launched = work.launches.forward * constants.launch * 1e-6
    launched_back = work.launches.backward * constants.launch * 1e-6
    again = {
        "none": 0.0,
        "selective": forward
        + launched
        + software.products_again * product
        + sum(each.forward for each in products if each.gathers),
        "full": product + attention + forward + launched + ahead + context,
    }
    if software.early_stop:
        again["full"] -= sum(each.product + each.forward for each in products if each.last)
    return Seconds(
        products=3 * product,
        attention=(1 + FUSED_BACKWARD) * attention,
        memory_bound=forward + backward,
        launches=launched + launched_back,
        recompute=again[rates.parallel.recompute] if body else logits_again * product,
        tensor=ahead + back,
        context=2 * context,
    )


def _add(*parts: Seconds) -> Seconds:
    return Seconds(*map(sum, zip(*(vars(each).values() for each in parts), strict=True)))


def _passes(rank: Seconds) -> tuple[float, float, float]:
    """A micro-batch's forward pass, and its backward pass in two: gradients of inputs, with all that
    is recomputed, and of weights."""
    messages = rank.tensor + rank.context + rank.pipeline
    attention = rank.attention / (1 + FUSED_BACKWARD)
    forward = (rank.products + rank.memory_bound + rank.launches) / 3 + attention + messages / 2
    weights = rank.products / 3
    return forward, rank.total - forward - weights, weights


def _data(
    rates: Rates, parameters: float, units: int, batches: int, busy: float, backward: float
) -> float:
    """Seconds of gathering parameters and reducing gradients that computation does not hide.

    parameters: of one rank's part of the model, before sharding, in so many units that are gathered
    one by one. busy: seconds of the step without them. backward: of the last micro-batch.
    """
    parallel, software, cluster = rates.parallel, rates.software, rates.cluster
    shard = parallel.data_parallel_shard * parallel.context_parallel
    copies, span = parallel.data_parallel_replicate, parallel.tensor_parallel * shard
    pipelined, again = parallel.pipeline_parallel > 1, parallel.gathers_again
    once = pipelined or software.keeps_parameters
    ring = parameters * (shard - 1) / shard / rates.data(span, parallel.tensor_parallel)
    hops = units * cluster.hops(shard, span) if shard > 1 else 0.0
    gathers = ring * (1 if software.float8_gathers else HALF) + hops
    if again or not once:  # each micro-batch gives back what it has gathered
        gathers *= batches if once or not again else 2 * batches
    reductions = ring * software.gradient_bytes + hops
    sums = 0.0  # over the copies, once a step
    if copies > 1:
        share = parameters / shard * 2 * (copies - 1) / copies
        sums = share * software.gradient_bytes / rates.data(span * copies, span)
        sums += units * cluster.tree_hops(copies, span * copies)
    if pipelined:  # all gradients are reduced at the end
        return exposed(gathers, busy) + reductions + sums
    if again:
        return exposed(gathers + batches * reductions + sums, busy)
    return exposed(gathers, busy) + exposed(reductions + sums, backward)  # at the last micro-batch
