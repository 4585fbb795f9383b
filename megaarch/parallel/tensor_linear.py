"""Linear layers whose weights tensor-parallel ranks share: by columns, which gathers the sequence before
its product, and by rows, which sums over the ranks and scatters the sequence after it.

A column-wise layer keeps for its backward pass the tokens that its rank holds, and gathers them once more
while it computes the gradient of its input; that gradient is scattered while it computes the weight's
(Korthikanti et al. 2022, section 4.2.2). So what layers keep is split over the ranks, all of it.

Products run on local tensors, by the rule of model/linear.py. Letters of shapes: docs/shapes.md.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from megaarch.config import schema
from megaarch.config.matmuls import head_size, key_heads
from megaarch.model.linear import bias_gradient, linear, product, weight_gradient
from megaarch.parallel.sequence_messages import (
    Ranks,
    gather,
    gathered,
    scatter,
    scattered,
    start_gather,
    start_scatter,
)


def overlaps_gradients(settings: schema.Settings) -> bool:
    """Whether column-wise layers send tokens and their gradients beside products of the backward pass. Not
    where the gradients of inputs and of weights are computed at different times, nor in torchao's layers
    (training.float8)."""
    return not settings.parallel.splits_backward and settings.training.float8 is None


def regathers_tokens(settings: schema.Settings) -> bool:
    """Whether column-wise layers keep their rank's tokens and gather all of them again in the backward pass.
    Not where a checkpoint drops the tokens anyway."""
    return overlaps_gradients(settings) and settings.parallel.recompute == "none"


def shares_memory(settings: schema.Settings) -> bool:
    """Whether the encoder's output is gathered once for all layers of a stage's decoder, and its gradients are
    summed before they are scattered. Not in torchao's layers: each gathers it for itself."""
    return settings.training.float8 is None


@dataclass(frozen=True)
class Exchange:
    """How tensor-parallel ranks exchange tokens around a column-wise layer. overlaps, regathers: as the functions
    above say."""

    overlaps: bool
    regathers: bool

    @classmethod
    def of(cls, settings: schema.Settings) -> "Exchange":
        return cls(overlaps_gradients(settings), regathers_tokens(settings))


class Style(ParallelStyle):
    """How tensor-parallel ranks share a module: where its parameters lie, and what runs in place of its `forward`."""

    @abstractmethod
    def placement(self, name: str, parameter: torch.Tensor, ranks: int) -> Placement:
        """Returns how a parameter of the module is split."""

    @abstractmethod
    def forward(self, module: nn.Module, ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
        """Returns what the module computes from x, on this rank's shares."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = Ranks.of(device_mesh)
        for name, parameter in list(module.named_parameters()):
            placement = self.placement(name, parameter, ranks.number)
            distribute(module, name, device_mesh, placement)
        module.forward = MethodType(lambda module, x: self.forward(module, ranks, x), module)
        return module


class Column(Style):
    """The output's columns are split over the ranks. exchange: None where the input has all tokens."""

    def __init__(self, exchange: Exchange | None):
        self.exchange = exchange

    def placement(self, name: str, parameter: torch.Tensor, ranks: int) -> Placement:
        return Shard(0)

    def forward(self, module: nn.Module, ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
        return columns(module, x, ranks, self.exchange, **shares(module))


class KeyGroup(Style):
    """A column-wise layer for fewer key heads than ranks: ranks share a key head, and each runs
    some of its queries.

    exchange: as of Column. rows: (start, length) of the output rows that run here. Rows of keys and values run
    on several ranks, which no placement of a DTensor says; so the weight is stored in even contiguous shares
    and gathered for use, and its gradient, a summand on every rank, is reduce-scattered back.
    """

    def __init__(self, rows: list[tuple[int, int]], exchange: Exchange | None):
        self.rows, self.exchange = rows, exchange

    def placement(self, name: str, parameter: torch.Tensor, ranks: int) -> Placement:
        return Replicate() if parameter.shape[0] % ranks else Shard(0)

    def forward(self, module: nn.Module, ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
        mine = {}
        for name, parameter in own_parameters(module):
            summed_in = torch.promote_types(parameter.dtype, torch.float32)
            whole = parameter.redistribute(placements=[Replicate()], backward_dtype=summed_in)
            whole = whole.to_local(grad_placements=[Partial()])  # a summand on every rank
            mine[name] = torch.cat([whole.narrow(0, *span) for span in self.rows])
        return columns(module, x, ranks, self.exchange, **mine)


class Row(Style):
    """The input's columns are split over the ranks, whose products are summands. Each adds the bias to its
    share of the sequence, so that it has a summand of the bias's gradient."""

    def placement(self, name: str, parameter: torch.Tensor, ranks: int) -> Placement:
        return Shard(1) if name == "weight" else Replicate()

    def forward(self, module: nn.Module, ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
        mine = shares(module)
        x_BsD = scatter(linear(x, mine["weight"]), ranks)
        return x_BsD + mine["bias"].to(x_BsD.dtype) if "bias" in mine else x_BsD


def key_group_rows(
    model: schema.Model, rank: int, ranks: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns the rows of qkv [Hkv, (q ... q k v), Dh] and of kv [Hkv, (k v), Dh] that one of `ranks`
    runs, as (start, length), where several ranks share a key head."""
    size, keys, heads = head_size(model), key_heads(model), model.heads // ranks
    group = model.heads // keys
    key, first = divmod(rank * heads, group)
    start = key * (group + 2)
    qkv = [((start + first) * size, heads * size), ((start + group) * size, 2 * size)]
    return qkv, [(key * 2 * size, 2 * size)]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """Returns a split module's own parameters by name."""
    for name, parameter in module.named_parameters(recurse=False):
        assert isinstance(parameter, DTensor)
        yield name, parameter


def shares(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns this rank's shares of a split module's own parameters by name."""
    return {name: parameter.to_local() for name, parameter in own_parameters(module)}


def distribute(owner: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Makes one parameter a DTensor. Every rank has the same values: nothing is sent."""
    parameter = owner.get_parameter(name)
    shares = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    setattr(owner, name, nn.Parameter(shares, requires_grad=parameter.requires_grad))


def columns(
    module: nn.Module,
    x_BsD: torch.Tensor,
    ranks: Ranks,
    exchange: Exchange | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the product [B, S, outputs] of all ranks' tokens with this rank's weight [outputs, D]."""
    if exchange is None:
        return module.multiply(x_BsD, weight, bias)  # pyright: ignore[reportCallIssue]
    if exchange.overlaps and torch.is_grad_enabled():
        return _Columns.apply(x_BsD, weight, bias, ranks, exchange.regathers)
    x_BSD = gather(x_BsD, ranks, summands=True)
    return module.multiply(x_BSD, weight, bias)  # pyright: ignore[reportCallIssue]


class _Columns(torch.autograd.Function):
    """`columns` of a `linear.Linear`, whose backward pass sends messages beside its products."""

    @staticmethod
    def forward(ctx, x_BsD, weight, bias, ranks, regathers):
        ctx.ranks, ctx.regathers = ranks, regathers
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        x_BSD = gathered(start_gather(x_BsD, ranks), ranks)
        weight = weight.to(x_BSD.dtype)
        ctx.save_for_backward(x_BsD if regathers else x_BSD, weight)
        return product(x_BSD, weight, None if bias is None else bias.to(x_BSD.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        (x, weight), ranks = ctx.saved_tensors, ctx.ranks
        if ctx.regathers:
            x = start_gather(_of_backward(x, grad), ranks)
        scattering = start_scatter(product(grad, weight.t()), ranks)
        x_BSD = gathered(x, ranks) if ctx.regathers else x
        grad_weight = weight_gradient(grad, x_BSD, ctx.weight_dtype)
        grad_bias = None if ctx.bias_dtype is None else bias_gradient(grad, ctx.bias_dtype)
        return scattered(scattering), grad_weight, grad_bias, None, None


def _of_backward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Returns x. The compiler takes two equal messages for one, and would keep all tokens from the forward
    pass for the backward pass: so what is sent there depends, by its form, on the gradient."""
    if not torch.compiler.is_compiling():
        return x
    return torch.where(grad.flatten()[0] == 0, x, x)
