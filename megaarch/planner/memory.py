"""What one rank holds at the fullest moment of a step, in bytes: counted, not measured. The dry run
(dry_run.py) is its oracle.

    parameters, gradients, optimizer   this rank's shards, fp32
    gathered                           what `fully_shard` holds of whole layers, and their gradients
    activations                        kept for the backward pass, of all micro-batches in flight
    workspace                          of the layer or the head at work, and pipeline buffers

Legend: d width, H heads, Hkv key heads, Dh head size, f feed-forward, V vocabulary, n tokens of a
micro-batch, T tensor ranks.
"""

from dataclasses import astuple, dataclass

import numpy as np

from megaarch.attention import sdpa_plan
from megaarch.attention.mask import Parts
from megaarch.config import catalogue
from megaarch.config.cached import cached
from megaarch.config.matmuls import GATED, head_size, key_heads
from megaarch.config.schema import Data, Model, Settings, Training
from megaarch.model.loss import ACCELERATOR, rows_of_chunk
from megaarch.model.parameter_count import parameter_sizes
from megaarch.model.transformer import stacks
from megaarch.parallel import tensor_linear
from megaarch.parallel.stages import Stages, overlap
from megaarch.planner.layer_costs import FULL, HALF, Layers
from megaarch.planner.pipeline_bubble import InFlight, in_flight
from megaarch.study.describe import made_up_batch

WHOLE = ("norm", "positions.", "segments.", "head_transform.")  # on every tensor-parallel rank
LAYER_COPIES = 4 + 2 + 2 + 1  # bytes: reduction in fp32, gathered, gathered ahead, gradients


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest pipeline rank."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_memory(settings: Settings) -> Memory:
    """Returns what a rank of the fullest pipeline stage holds, in a layout that fits (validate.check)."""
    return max(memory_by_rank(settings), key=lambda memory: memory.total)


def memory_by_rank(settings: Settings) -> list[Memory]:
    """Returns what a rank of each pipeline stage holds."""
    stages, parallel = Stages.of(settings), settings.parallel
    return [_memory(settings, stages, rank) for rank in range(parallel.pipeline_parallel)]


def micro_batches(settings: Settings) -> int:
    """Returns the number of micro-batches of a step on one data-parallel rank."""
    training = settings.training
    return training.global_batch_size // (training.micro_batch_size * settings.parallel.data_ranks)


def parameters_by_rank(settings: Settings) -> list[float]:
    """Parameters of each pipeline rank, before sharding over data ranks."""
    stages = Stages.of(settings)
    held = [_held(settings, stages, rank) for rank in range(settings.parallel.pipeline_parallel)]
    return [sum(layers.values()) + outside for outside, layers in held]


def _held(settings: Settings, stages: Stages, rank: int) -> tuple[float, dict[int, float]]:
    """Parameters on a rank of this pipeline stage: outside of layers, and of each layer."""
    tensor = settings.parallel.tensor_parallel
    return _held_by(settings.model, settings.data.objective, tensor, stages, rank)


@cached(4096)
def _held_by(
    model: Model, objective: str, tensor: int, stages: Stages, rank: int
) -> tuple[float, dict[int, float]]:
    layers, others = _split_sizes(model, objective, tensor)
    mine = {i for stage in stages.on(rank) for i in stages.layers[stage]}
    outside = sum(size for name, size in others if rank in stages.holders(name, model))
    return outside, {i: layers[i] for i in mine}


@cached(64)
def _split_sizes(
    model: Model, objective: str, tensor: int
) -> tuple[dict[int, float], list[tuple[str, float]]]:
    """Parameters of a tensor-parallel rank: of each layer, and those outside of layers by name."""
    layers: dict[int, float] = {}
    others: list[tuple[str, float]] = []
    for name, size in parameter_sizes(model, catalogue.position_axes(objective)).items():
        split = size if any(part in name for part in WHOLE) else size / tensor
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            layers[layer] = layers.get(layer, 0.0) + split
        else:
            others.append((name, split))
    return layers, others


def _memory(settings: Settings, stages: Stages, rank: int) -> Memory:
    parallel, training = settings.parallel, settings.training
    shards = parallel.data_parallel_shard * parallel.context_parallel
    root, by_layer = _held(settings, stages, rank)
    count, layer = root + sum(by_layer.values()), max(by_layer.values())
    shard, batches = count / shards, micro_batches(settings)
    ends = stages.layers[-1].stop in {stages.layers[s].stop for s in stages.on(rank)}
    kept, summed, one, work = _kept(settings, stages, rank, by_layer)
    pipelined = parallel.pipeline_parallel > 1
    whole = HALF * count  # parameters in half precision
    if pipelined:
        whole += max(0.0, summed + FULL * (root - shard))
    elif not parallel.gathers_again and batches > 1:
        whole += FULL * (count - shard)  # and the sum of gradients, until the last micro-batch
    stays, head = _head(settings) if ends else (0.0, 0.0)
    # gpipe's last stage runs all of its forward passes before the first backward pass
    head += stays * (batches if pipelined and parallel.schedule == "gpipe" else 1)
    if not _sharded(settings):
        # `kept` has those of the layers where every pass in flight makes its own
        half = HALF * (root if _casts_stay(settings) else count)
        last, moments = half, [(half, kept + max(head, work))]
    elif pipelined or not parallel.gathers_again:
        # the end of a forward pass; and the reduction of a layer's gradients behind it
        last = HALF * root + LAYER_COPIES * layer
        moments = [(whole, kept + head), (whole + HALF * layer, kept + work)]
    else:
        # the end of the forward pass, which leaves the last layer gathered, and behind another micro-batch what was
        # reduced last; and the backward pass of the last layer but one, while the last one's gradients are on their way
        last = 2 * HALF * root + LAYER_COPIES * layer
        reduced = FULL * root if batches > 1 else 0.0
        moments = [(HALF * (root + layer) + reduced, kept + head), (last, kept - one + work)]
    # of a step's only micro-batch the gradients are there at the end of its backward pass alone
    early = 0.0 if batches == 1 and not pipelined else FULL * shard
    found = [(early, *moment) for moment in moments] + [(FULL * shard, last, one + work)]
    grads, gathered, used = max(found, key=sum)
    return Memory(
        parameters=FULL * shard,
        gradients=grads,
        optimizer=FULL * catalogue.OPTIMIZERS[training.optimizer].states * shard,
        gathered=gathered,
        activations=min(kept, used),
        workspace=max(0.0, used - kept) + _received(settings, stages, rank),
    )


def _sharded(settings: Settings) -> bool:
    """Whether FSDP gathers a layer's parameters, in half precision, for all micro-batches (parallel/fsdp.py)."""
    return settings.parallel.data_ranks * settings.parallel.context_parallel > 1


def _casts_stay(settings: Settings) -> bool:
    """Whether each pass in flight through a stage keeps the layers' parameters in half precision, its own."""
    parallel = settings.parallel
    pipelined = parallel.pipeline_parallel > 1
    return pipelined and not _sharded(settings) and parallel.recompute == "none"


def _kept(
    settings: Settings, stages: Stages, rank: int, by_layer: dict[int, float]
) -> tuple[float, float, float, float]:
    """Bytes kept for backward passes and of whole gradients, at the moment that has most of both; what one
    layer keeps; and what the layer at work has besides. by_layer: its parameters."""
    recompute, counter, mine = settings.parallel.recompute, Kept(settings), stages.on(rank)
    whole, least = 0.0, 0.0
    bytes_of = np.zeros((len(mine), len(InFlight._fields)))
    for place, stage in enumerate(mine):
        held = sum(by_layer[i] for i in stages.layers[stage])
        bytes_of[place, 2:] = FULL * held, HALF * held
        bytes_of[place, 0] = HALF * held if _casts_stay(settings) else 0.0
        for stream, stack in enumerate(stacks(settings.model)):
            layers = overlap(stack.layers, stages.layers[stage])
            if not layers:
                continue
            each = counter.layer(stream)
            whole, least = max(whole, each["none"]), max(least, each[recompute])
            bytes_of[place, 0] += len(layers) * each[recompute]
            bytes_of[place, 0] += counter.beside_layers(stream, layers.start == stack.layers.start)
            bytes_of[place, 1] += len(layers) * each["pending"]
    moments = in_flight(settings.parallel, micro_batches(settings), rank)
    by_kind = (moments * bytes_of).sum(axis=1)  # [moments, 4]
    kept, late, summed, unsummed = by_kind[by_kind.sum(axis=1).argmax()].tolist()
    # the backward pass of a layer gives back as it goes; recomputed, it first makes all again
    return kept + late, summed + unsummed, least, max(0.0, whole - least) + counter.gradients()


def _received(settings: Settings, stages: Stages, rank: int) -> float:
    """Buffers for what stages receive, activations and gradients: one for each micro-batch."""
    layers, last = Layers(settings), len(stages.layers) - 1
    starts = [
        stages.layers[there].start
        for stage in stages.on(rank)
        for there in (stage, stage + 1)
        if 0 < there <= last
    ]
    return micro_batches(settings) * sum(map(layers.received, starts))


def _head(settings: Settings) -> tuple[float, float]:
    """Returns the bytes of the output layer that wait for its backward pass (gathered hidden states, rows of
    targets, slopes kept); and the logits at work or, in the backward pass, the gradient of the table, in fp32 and
    as it is added to or cast."""
    model, tensor = settings.model, settings.parallel.tensor_parallel
    counter = Layers(settings)
    rows, columns = counter.head().products[0][:2]
    d, table = model.hidden_size, columns * model.hidden_size
    kept = min(ACCELERATOR.kept, HALF * rows * columns)
    chunk = min(rows, rows_of_chunk(ACCELERATOR, columns))
    logits = 3 * FULL * chunk * columns
    work = max(logits, FULL * table + (FULL if chunk < rows else HALF) * table)
    if kept < HALF * rows * columns:  # the other slopes are made again
        work = max(work, logits + FULL * table)
    gathered = counter.tokens(-1) * d * (HALF if tensor > 1 else 0)
    return gathered + 3 * HALF * rows * d + kept, work


class Kept:
    """Bytes that the layers of a layout keep of one micro-batch."""

    def __init__(self, settings: Settings):
        self.settings, self.work = settings, Layers(settings)
        training = settings.training
        model, data = settings.model, settings.data.model_dump_json()
        several = settings.parallel.pipeline_parallel > 1
        self.calls = _calls(model, data, training.micro_batch_size, several)

    def layer(self, stream: int) -> dict[str, float]:
        """Returns what one layer of a stack keeps, by `parallel.recompute`; and, `pending`, the gradients that
        wait for the second half of a split backward pass."""
        model, tensor = self.settings.model, self.settings.parallel.tensor_parallel
        d, n = model.hidden_size, self.work.tokens(stream)
        f = model.feed_forward_size / tensor
        gated = model.activation in GATED
        branches = 3 if stream > 0 else 2
        queries, keys = (h * head_size(model) / tensor for h in (model.heads, key_heads(model)))
        residual = HALF * n * d / tensor
        again = tensor_linear.regathers_tokens(self.settings)
        norms = branches * HALF * n * d / (tensor if again else 1)
        dropped = branches * (HALF + 1) * n * d / tensor if model.dropout else 0.0
        blocks = HALF * n * f * (4 if gated else 1 if model.activation == "relu" else 2)
        returned = [(p.gathers, HALF * p.m * p.n) for p in self.work.products(stream)]
        products = sum(size for _, size in returned)
        attention, out = self._attention(stream, 0, queries, keys)
        if stream > 0:
            memory = self.work.tokens(stream - 1)
            crossed, more = self._attention(stream, 1, queries, keys)
            attention, out = attention + crossed, out + more
            if tensor > 1 and not tensor_linear.shares_memory(self.settings):
                norms += HALF * memory * d
        late = sum(size for column, size in returned if column) + branches * residual  # and norms'
        if tensor > 1:  # gradients of what a row-wise product returns, gathered
            late += branches * HALF * n * d
        return {
            "pending": late,
            "none": branches * residual + norms + attention + blocks + dropped,
            "selective": residual + products + out + (branches * residual if tensor > 1 else 0.0),
            "full": residual,
        }

    def beside_layers(self, stream: int, begins: bool) -> float:
        """Returns what a stage keeps of a stack besides its layers: rotary tables; of one that `begins`
        there, its embedded tokens and the memory, normalized; of another, the memory that it passes on; and the
        memory of all tensor ranks."""
        model, tensor = self.settings.model, self.settings.parallel.tensor_parallel
        rope = model.position_encoding == "rope"
        tables = 2 * FULL * self.work.tokens(stream) * head_size(model) if rope else 0.0
        memory = self.work.tokens(stream - 1) if stream > 0 else 0
        rows = memory + self.work.tokens(stream) * begins
        gathered = memory if tensor > 1 and tensor_linear.shares_memory(self.settings) else 0
        return tables + HALF * (rows / tensor + gathered) * model.hidden_size

    def gradients(self) -> float:
        """Returns the gradients of activations in the layer at work: those of its widest product's inputs and
        outputs."""
        model, tensor = self.settings.model, self.settings.parallel.tensor_parallel
        n = max(self.work.tokens(s) for s in range(len(self.work.slots)))
        width = model.feed_forward_size / tensor * (1 + (model.activation in GATED))
        return HALF * n * (width + model.hidden_size)

    def _attention(
        self, stream: int, cross: int, queries: float, keys: float
    ) -> tuple[float, float]:
        """What attention keeps, and of that what its kernels and exchanges of heads return. queries, keys:
        widths on a tensor-parallel rank."""
        parallel, rope = self.settings.parallel, self.settings.model.position_encoding == "rope"
        context, n = parallel.context_parallel, self.work.tokens(stream)
        memory = self.work.tokens(stream - 1) if cross else n
        heads = self.settings.model.heads / (parallel.tensor_parallel * context)
        calls = self.calls[stream][cross]
        fused = HALF * (n * queries + 2 * memory * keys)
        turned = HALF * n * (queries + keys) if rope and not cross else 0.0
        copied = HALF * (calls.q * queries + 2 * calls.k * keys) / context
        out = HALF * calls.out * queries / context + FULL * calls.out * heads
        laid = HALF * n * queries * (1 if context > 1 else 1 - calls.whole)
        bias = 0.0
        if self.settings.model.position_encoding == "relative" and not cross:
            bias = calls.pairs * (HALF * heads + 8)  # and the bucket of each pair
        inputs = fused if context > 1 else fused + turned
        whole = inputs + copied + out + laid + bias + HALF * calls.masked
        return whole, out + (fused + laid if context > 1 else 0.0)


@dataclass(frozen=True)
class Calls:
    """A micro-batch's attention, summed over calls. q, k: rows that are copied for a call. out: rows of
    results. pairs: of queries and keys. masked: those pairs under a mask that is stored. whole: share of
    micro-batches in which one call's result is the output."""

    q: float
    k: float
    out: float
    pairs: float
    masked: float
    whole: float


@cached(512)
def _calls(model: Model, data: str, rows: int, several: bool) -> tuple[tuple[Calls, ...], ...]:
    """Returns each stream's self-attention, and its attention to the stream before if there is one. several: the
    mean of micro-batches that are in flight together, else the largest of some."""
    training = Training(micro_batch_size=rows, global_batch_size=rows)
    settings = Settings(model=model, data=Data.model_validate_json(data), training=training)
    batches = [made_up_batch(settings, i) for i in range(8 if several else 4 if rows < 4 else 1)]

    def count(stream: int, which: str) -> Calls:
        found = [_count(getattr(batch.streams[stream], which)) for batch in batches]
        if several:
            return Calls(*(sum(x) / len(found) for x in zip(*map(astuple, found), strict=True)))
        return max(found, key=lambda calls: calls.q + 2 * calls.k + calls.out)

    return tuple(
        tuple(count(stream, which) for which in (("parts", "cross") if stream else ("parts",)))
        for stream in range(len(batches[0].streams))
    )


def _count(parts: Parts) -> Calls:
    plan = sdpa_plan.build(parts)
    q = k = out = pairs = masked = 0
    for call in plan.calls:
        rows = len(call.q_lengths) * int(call.q_lengths.max())
        keys = int(call.k_lengths.max())
        q += rows * isinstance(call.q, np.ndarray)
        k += len(call.q_lengths) * keys * isinstance(call.k, np.ndarray)
        out += rows
        pairs += rows * keys
        masked += rows * keys * call.masked
    return Calls(q, k, out, pairs, masked, plan.whole)
