"""Tensor and sequence parallelism: a plan that maps module names to how their weights are split.

Between modules, hidden states are plain tensors split along the sequence; a column-wise linear
layer gathers the sequence and makes its share of heads or channels, a row-wise one sums over ranks
and scatters the sequence again (Korthikanti et al. 2022, figure 5):

    [B, s, D] norm -> gather [B, S, D] -> column-wise -> attend, activation -> row-wise -> scatter

These layers are in tensor_linear.py, their messages in sequence_messages.py.

Embedding and output layer are split by vocabulary: of T ranks, rank r holds ids r·V/T to (r+1)·V/T.
Looking up sums over ranks, of which one has the token. The head gathers the sequence first and runs
the last norm on target rows, the same on every rank; the loss is model/loss.py's, which knows of ranks.

Letters of shapes: docs/shapes.md.
"""

from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from megaarch.config.matmuls import key_heads
from megaarch.config.schema import Settings
from megaarch.distributed.mesh import Grid
from megaarch.kernels.rms_norm import RMSNorm, rms_norm
from megaarch.model.layers import Layer, LayerNorm, layer_norm
from megaarch.model.sharding import Sharding
from megaarch.model.transformer import Transformer
from megaarch.parallel.sequence_messages import Ranks, gather, scatter
from megaarch.parallel.tensor_linear import (
    Column,
    Exchange,
    KeyGroup,
    Row,
    Style,
    distribute,
    key_group_rows,
    own_parameters,
    shares,
    shares_memory,
)


def apply(model: Transformer, grid: Grid, settings: Settings) -> None:
    """Splits the parameters of a model that is not split yet, on `meta` or holding the same values
    on every rank, over the ranks of axis `tp`: they become DTensors, under unchanged names.

    Streams then need lengths that are multiples of the ranks. Apply it before all else.
    `validate.check` says what must divide.
    """
    if grid.size("tp") == 1:
        return
    mesh, ranks = grid.submesh("tp"), grid.size("tp")
    heads = model.settings.heads
    assert heads % ranks == 0, f"{heads} heads among {ranks} ranks"
    styles, summands = plan(settings, mesh), set()
    for name, module in list(model.named_modules()):
        fitting = [style for pattern, style in styles.items() if fnmatchcase(name, pattern)]
        assert len(fitting) <= 1, f"{name} stands in the tensor plan twice"
        for style in fitting:
            parallelize_module(module, mesh, style, src_data_rank=None)
            if isinstance(style, Row) or (isinstance(style, Whole) and style.share):
                own = [n for n, p in own_parameters(module) if p.placements[0].is_replicate()]
                summands |= {f"{name}.{parameter}" for parameter in own}
    for stream in model.relative_bias:
        distribute(model.relative_bias, stream, mesh, Shard(1))
    if model.output_bias is not None:
        distribute(model, "output_bias", mesh, Shard(0))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not in the tensor plan"
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        # Where ranks share a key head, each runs only some of its queries.
        layer.attention.group = min(layer.attention.group, heads // ranks)
    shared = shares_memory(settings)
    model.sharding = TensorSharding(mesh, frozenset(summands), shares_memory=shared)


class TensorSharding(Sharding):
    """What the ranks of `mesh` hold under tensor and sequence parallelism. shares_memory: as
    `tensor_linear.shares_memory` says."""

    def __init__(self, mesh: DeviceMesh, summands: frozenset[str], *, shares_memory: bool = True):
        self.ranks, self.summands, self.group = Ranks.of(mesh), summands, mesh.get_group()
        self.shares_memory = shares_memory

    def gather_sequence(self, x_BsD: torch.Tensor) -> torch.Tensor:
        return gather(x_BsD, self.ranks, summands=False)

    def gather_memory(self, memory_BtD: torch.Tensor) -> torch.Tensor:
        if not self.shares_memory:
            return memory_BtD
        return gather(memory_BtD, self.ranks, summands=True)

    def first_token(self, length: int) -> int:
        return self.ranks.own * (length // self.ranks.number)

    def local(self, parameter: torch.Tensor) -> torch.Tensor:
        assert isinstance(parameter, DTensor)
        return parameter.to_local()

    def vocabulary(self, ids: int) -> dict[str, Any]:
        return {"first": self.ranks.own * ids, "group": self.group}

    def logits(
        self, hidden: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
    ) -> torch.Tensor:
        """weight and bias: DTensors split by ids. Without gradient."""
        mine = super().logits(hidden, weight_VD, bias_V).contiguous()
        every = [torch.empty_like(mine) for _ in range(self.ranks.number)]
        distributed.all_gather(every, mine, group=self.group)
        return torch.cat(every, -1)


def plan(settings: Settings, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """Maps patterns of module names to how these modules are split. A name fits one pattern at most."""
    model, exchange = settings.model, Exchange.of(settings)
    column, row = Column(exchange), Row()
    if settings.training.float8 is not None:  # a scale is of all ranks' shares: torchao finds it
        column = ColwiseParallel(input_layouts=Shard(1))
        row = RowwiseParallel(output_layouts=Shard(1))
    of_memory = None if shares_memory(settings) else exchange
    qkv, kv = column, Column(None) if of_memory is None else column
    if key_heads(model) < mesh.size():
        rows, rows_of_memory = key_group_rows(model, mesh.get_local_rank(), mesh.size())
        qkv, kv = KeyGroup(rows, exchange), KeyGroup(rows_of_memory, of_memory)
    on_share, on_all = Whole(split=False, share=True), Whole(split=False, share=False)
    return {
        "embedding": Vocabulary(),
        "output": Vocabulary(),
        "positions.*.*": Whole(split=True, share=True),
        "segments": Whole(split=True, share=True),
        "embedding_norm.*": on_share,
        "layers.*_norm": on_share,
        "encoder_norm": on_share,
        "norm": on_all,
        "head_transform.dense": on_all,
        "head_transform.norm": on_all,
        "layers.*.attention.qkv": qkv,
        "layers.*.cross_attention.q": column,
        "layers.*.cross_attention.kv": kv,
        "layers.*.feed_forward.gate_up": column,
        "layers.*.feed_forward.up": column,
        "layers.*attention.output": row,
        "layers.*.feed_forward.down": row,
    }


class Whole(Style):
    """Every rank holds the parameters whole.

    split: the input [B, S, ...] is the same on every rank, which takes its share of the sequence.
    share: what runs is a share of the sequence, so a rank's gradients are a summand, which
        gradients.sum_summands sums once a step. Otherwise every rank has all of the gradient.

    Not torch's SequenceParallel, whose gradients have the placement Partial: FSDP would sum each of
    them by itself for every micro-batch, in the type of the compute.
    """

    def __init__(self, *, split: bool, share: bool):
        self.split, self.share = split, share

    def placement(self, name: str, parameter: torch.Tensor, ranks: int) -> Placement:
        return Replicate()

    def forward(self, module: nn.Module, ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
        if self.split:
            x = x.chunk(ranks.number, dim=1)[ranks.own]
        return run(module, x, **shares(module))


def run(module: nn.Module, x: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
    """Returns what a module computes, with these in place of its parameters."""
    if isinstance(module, nn.Linear):  # linear.Linear or float8's
        return module.multiply(x, **parameters)  # pyright: ignore[reportCallIssue]
    return RUN[type(module)](module, x, **parameters)


RUN = {
    RMSNorm: lambda m, x, weight: rms_norm(x, weight, m.eps, m.fused),
    LayerNorm: lambda m, x, weight, bias=None: layer_norm(x, weight, bias, m.eps),
    nn.Embedding: lambda m, x, weight: F.embedding(x, weight),
}


class Vocabulary(Style):
    """A table [V, D] split by its rows; called, it looks tokens up."""

    def placement(self, name: str, parameter: torch.Tensor, ranks: int) -> Placement:
        return Shard(0)

    def forward(self, module: nn.Module, ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
        return embed(x, shares(module)["weight"], ranks)


def embed(tokens_BS: torch.Tensor, weight_vD: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Returns [B, s, D]: this rank's share of the sequence, from all of its tokens.

    weight: this rank's rows of the table. torch's own rowwise embedding is right too, but its backward pass
    makes the gradient of the whole table on every rank before it takes a slice.
    """
    local_BS = tokens_BS - ranks.own * len(weight_vD)
    outside_BS = (local_BS < 0) | (local_BS >= len(weight_vD))
    x_BSD = F.embedding(local_BS.masked_fill(outside_BS, 0), weight_vD)
    x_BSD = x_BSD.masked_fill(outside_BS[..., None], 0)
    return scatter(x_BSD, ranks)
