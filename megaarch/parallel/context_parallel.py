"""Context parallelism: each rank holds a contiguous shard of every row's tokens (Ulysses:
Jacobs et al. 2023).

All of a layer but attention works on tokens alone. Around attention, one all-to-all trades token
shards for head shards, so that `attend` sees whole rows and the batch's unchanged parts, and one
more trades back. No mask knowledge is needed.

    rank 0: tokens 0..s, all heads          all tokens, heads 0..h
    rank 1: tokens s..2s, all heads  --->   all tokens, heads h..2h   --> attend --> and back

Before the head one exchange more gives each rank every W-th token of all shards. The head runs on the
targets that are read off there: these stand together (in a suffix, in spans), and would else lie with the
last ranks. So losses and gradients of parameters are partial: their sums over the ranks are those of one
process.

Letters of shapes: docs/shapes.md. W ranks; s of S tokens and h of H heads, a share each.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import distributed, nn
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from megaarch.attention import Parts, RelativeBias, attend
from megaarch.data.batch import Batch, Stream
from megaarch.data.packing import HEAD_MULTIPLE
from megaarch.distributed.mesh import Grid
from megaarch.errors import UserError
from megaarch.model import TargetLosses, Transformer
from megaarch.model.layers import CrossAttention, SelfAttention


def apply(model: Transformer, grid: Grid) -> None:
    """Makes every attention exchange tokens for heads. The model then takes batches of
    `local_batch`. Apply it after the tensor plan and before sharding; meta is fine."""
    if grid.size("cp") == 1:
        return
    exchange = Ulysses(grid.submesh("cp").get_group(), grid.rank("cp"), grid.size("cp"))
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.attend = exchange
    model.deal_rows = exchange.deal


@dataclass(frozen=True)
class Ulysses:
    """`attend` for token shards: q [B, s, H, Dh], k and v [B, t, Hkv, Dh], of s and t tokens of rows
    that `parts` and the positions describe whole. Returns [B, s, H, Dh]."""

    group: distributed.ProcessGroup
    rank: int
    ranks: int

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parts: Parts,
        *,
        bias: RelativeBias | None = None,
        **options,
    ) -> torch.Tensor:
        here, whole = (q.shape[1], k.shape[1]), (parts.queries, parts.keys)
        assert tuple(n * self.ranks for n in here) == whole, f"shards of {here} tokens, not {whole}"
        repeats = self.ranks // math.gcd(k.shape[2], self.ranks)
        if repeats > 1:  # too few key heads for the ranks: several get the same, gradients add up
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        if here[0] == here[1]:
            q, k, v = self.to_heads(q, k, v)
        else:
            (q,), (k, v) = self.to_heads(q), self.to_heads(k, v)
        if bias is not None:
            heads = q.shape[2]
            bias = replace(bias, table=bias.table.narrow(1, self.rank * heads, heads))
        return self.to_tokens(attend(q, k, v, parts, bias=bias, **options))

    def to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns this rank's heads of all tokens, [B, S, h, Dh], of each [B, s, H, Dh]. One exchange."""
        sent = [x.unflatten(2, (self.ranks, -1)) for x in tensors]
        heads = [x.shape[3] for x in sent]
        sent_WBshDh = torch.cat(sent, dim=3).movedim(2, 0)
        received_WBshDh = _AllToAll.apply(sent_WBshDh, self.group)
        return received_WBshDh.movedim(0, 1).flatten(1, 2).split(heads, dim=2)

    def to_tokens(self, x_BShDh: torch.Tensor) -> torch.Tensor:
        """Returns this rank's tokens of all heads, [B, s, H, Dh], of [B, S, h, Dh]."""
        sent_WBshDh = x_BShDh.unflatten(1, (self.ranks, -1)).movedim(1, 0)
        return _AllToAll.apply(sent_WBshDh, self.group).movedim(0, 2).flatten(2, 3)

    def deal(self, x_BsD: torch.Tensor) -> torch.Tensor:
        """Returns every W-th of each rank's tokens [B, s, D], as `_dealt` says; zeros fill up what W does not
        divide."""
        x_BsD = nn.functional.pad(x_BsD, (0, 0, 0, -x_BsD.shape[1] % self.ranks))
        sent_WBtD = x_BsD.unflatten(1, (-1, self.ranks)).movedim(2, 0).roll(self.rank, 0)
        return _AllToAll.apply(sent_WBtD, self.group).movedim(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Sends message r of x [W, ...] to rank r; message r of the result came from rank r. It is its own
    transpose. (In torch 2.11 all_to_all_single has no gradient.)"""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's: *grads
        return _exchange(grad, ctx.group), None


def _exchange(x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    return wait_tensor(all_to_all_single(x.contiguous(), None, None, group))


def local_batch(batch: Batch, grid: Grid) -> Batch:
    """Returns this rank's shard of a batch: its tokens of each stream, and the targets whose rows it is
    dealt (`Ulysses.deal`).

    Positions, parts, targets, weights and counts stay those of the whole batch; `target_index`
    counts the rows dealt. Call it on the host, before `Batch.to`: on a device it
    waits for the choice of head rows. UserError where a row does not divide among the ranks.
    """
    ranks, rank = grid.size("cp"), grid.rank("cp")
    if ranks == 1:
        return batch
    streams = tuple(_shard(stream, rank, ranks) for stream in batch.streams)
    dealt, index = _dealt(batch.target_index, streams[-1].tokens.shape[1], ranks)
    used = batch.head_rows[: batch.head_count]
    used = used[dealt.flatten()[used] == rank]
    padding = -len(used) % HEAD_MULTIPLE if len(used) else HEAD_MULTIPLE
    return replace(
        batch,
        streams=streams,
        target_index=index,
        head_rows=torch.cat((used, used.new_zeros(padding))),
        head_count=len(used),
    )


def _dealt(token: torch.Tensor, share: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which rank is dealt a token of a row whose shards are of `share` tokens, and its place there. Each
    shard is dealt from its own rank on, so that short ones do not all begin with the first."""
    holder, place = token // share, token % share
    return (holder + place) % ranks, holder * -(-share // ranks) + place // ranks


def _shard(stream: Stream, rank: int, ranks: int) -> Stream:
    length = stream.tokens.shape[1]
    if length % ranks:
        raise UserError(
            f"parallel.context_parallel: a row of {length} tokens does not divide among {ranks} "
            "ranks; lengthen it with padding"
        )
    assert length == stream.parts.queries, "this batch is a shard already"
    first, share = rank * (length // ranks), length // ranks
    segments = stream.segments
    return replace(
        stream,
        tokens=stream.tokens[:, first : first + share],
        segments=None if segments is None else segments[:, first : first + share],
        first=first,
    )


def gather(losses: TargetLosses, grid: Grid) -> TargetLosses:
    """Returns the losses of all targets, on every rank, from those of each rank's shard; no gradient."""
    return losses.map(lambda loss: grid.sum(loss.detach().clone(), ("cp",)))
