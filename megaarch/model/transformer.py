"""One transformer for every architecture: it sees tokens, positions and parts, and no mask kind.

An architecture is here only a count of stacks. Layers are keyed by their global index, encoder
first, so that a name is the same in every layout. A pipeline stage keeps the layers and tables that
it needs, and runs its range of layers. Letters of shapes: docs/shapes.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import nn

from megaarch.attention.bias import RelativeBias
from megaarch.config import schema
from megaarch.config.catalogue import ARCHITECTURES
from megaarch.config.matmuls import head_size, key_heads, stack_layers
from megaarch.data.batch import Batch, Stream
from megaarch.errors import UserError
from megaarch.model.dropout import DropoutKeys, dropout
from megaarch.model.fused_decode import few_tokens
from megaarch.model.kv_cache import Cache
from megaarch.model.layers import ACTIVATIONS, Context, Layer, MakeLinear, normalization
from megaarch.model.linear import Linear
from megaarch.model.loss import Slope, TargetLosses, cross_entropy
from megaarch.model.positions import LearnedPositions, rotary_tables
from megaarch.model.sharding import Sharding

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Stack:
    """A stack's stream, its global layer indices, whether it attends to the stack before it, and the
    catalogue's facts of its stream."""

    stream: str
    layers: range
    cross: bool
    looks_ahead: bool
    bidirectional_bias: bool


def stacks(model: schema.Model) -> tuple[Stack, ...]:
    """Returns the stacks of a model, in order; the last one carries the targets."""
    row = ARCHITECTURES[model.architecture]
    ranges = pairwise(accumulate(stack_layers(model), initial=0))
    facts = zip(row.streams, ranges, row.looks_ahead, row.bidirectional_bias, strict=True)
    return tuple(
        Stack(stream, range(first, stop), first > 0, looks_ahead, bidirectional_bias)
        for stream, (first, stop), looks_ahead, bidirectional_bias in facts
    )


def overlap(a: range, b: range) -> range:
    """Returns the indices in both ranges."""
    return range(max(a.start, b.start), min(a.stop, b.stop))


def padded_vocabulary(size: int) -> int:
    """Returns the rows of the embedding and the output layer for so many ids."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class HeadTransform(nn.Module):
    """BERT's dense layer, activation and norm before the output (Devlin et al. 2019)."""

    def __init__(self, model: schema.Model):
        super().__init__()
        self.dense = Linear(model.hidden_size, model.hidden_size, model.bias)
        self.activation = ACTIVATIONS[model.activation]
        self.norm = normalization(model)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.dense(hidden))
        return self.norm(hidden)


class Transformer(nn.Module):
    """Takes streams of tokens and returns one loss for each target.

    Layers compute in the dtype of the residual stream and cast their parameters to it.
    `compute_dtype` sets it; None: that of the parameters. With bf16 parameters are fp32 masters,
    and statistics and losses stay fp32; where FSDP gathers parameters in bf16 nothing is left to
    cast, so that bf16 means the same in every layout.

    `position_axes` is the number of axes A that the batch's positions have (GLM: 2). Parameters are
    torch's own until `initialize` is called; building under `torch.device("meta")` is fine.
    `layer_linear` makes the linear layers of `layers`; the head's are always `linear.Linear`.
    """

    def __init__(
        self, model: schema.Model, *, position_axes: int = 1, layer_linear: MakeLinear = Linear
    ):
        super().__init__()
        assert model.heads % key_heads(model) == 0, "heads must be a multiple of kv_heads"
        self.settings, self.stacks = model, stacks(model)
        self.compute_dtype: torch.dtype | None = None
        self.position_axes = position_axes
        self.dropout_step: tuple[int, int] | None = None
        self.sharding = Sharding()
        self.slope: Slope | None = None  # of the loss; None: that of `cross_entropy`
        # exchanges tokens [B, S, D] before the head (context parallelism)
        self.deal_rows: Callable[[torch.Tensor], torch.Tensor] | None = None
        streams = [stack.stream for stack in self.stacks]
        rows, width = padded_vocabulary(model.vocabulary_size), model.hidden_size

        self.embedding = nn.Embedding(rows, width)
        self.segments = nn.Embedding(model.segments, width) if model.segments else None
        self.positions = nn.ModuleDict()
        if model.position_encoding == "learned":
            for s in streams:
                self.positions[s] = LearnedPositions(
                    model.position_rows, width, position_axes, model.position_offset
                )
        self.embedding_norm = nn.ModuleDict()
        if model.embedding_normalization:
            self.embedding_norm.update({s: normalization(model) for s in streams})
        self.relative_bias = nn.ParameterDict()
        if model.position_encoding == "relative":
            shape = (model.relative_buckets, model.heads)
            self.relative_bias.update({s: nn.Parameter(torch.zeros(shape)) for s in streams})
        self.layers = nn.ModuleDict(
            {
                str(i): Layer(model, stack.cross, layer_linear)
                for stack in self.stacks
                for i in stack.layers
            }
        )
        final = model.final_normalization
        self.encoder_norm = normalization(model) if final and len(self.stacks) > 1 else None
        self.norm = normalization(model) if final else None
        self.head_transform = HeadTransform(model) if model.head_transform else None
        self.output = None if model.tied_embedding else Linear(width, rows, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(rows)) if model.output_bias else None

    def set_dropout_step(self, seed: int, step: int) -> None:
        """Says which masks dropout draws from here on; call it before each optimizer step."""
        self.dropout_step = (seed, step)

    def forward(
        self,
        batch: Batch,
        text_tokens: torch.Tensor | None = None,
        layers: range | None = None,
        received: tuple[torch.Tensor, ...] = (),
        cache: Cache | None = None,
    ) -> TargetLosses | torch.Tensor | tuple[torch.Tensor, ...]:
        """Returns the losses [B, M] of a micro-batch's targets. text_tokens: bool [vocabulary_size],
        or None.

        layers, received: the range of layers of a pipeline stage, and what `run` returned on the
        stage before it. A stage that ends before the model does returns what `run` returns.
        cache: in generation, of the last stack. The batch then holds new tokens alone, no tokens of an
        encoder that the cache has; the result is the logits [R, vocabulary_size] of `batch.head_rows`.
        """
        out = self.run(batch, layers, received, cache)
        if cache is not None:
            return self.row_logits(self.target_rows(out[-1], batch))
        whole = layers is None or layers.stop == self.stacks[-1].layers.stop
        return self.head(out[-1], batch, text_tokens) if whole else out

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Returns what the last stack leaves, [B, S, D], before the final norm."""
        return self.run(batch)[-1]

    def run(
        self,
        batch: Batch,
        layers: range | None = None,
        received: tuple[torch.Tensor, ...] = (),
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Runs a range of layers, by global index, or all. Returns (h,) or, in a decoder that attends
        to an encoder, (memory, h): what the next layer starts from, each [B, S, D].

        received: the same from the layers before; empty where `layers` begin the model.
        """
        out = received
        for index, stack in enumerate(self.stacks):
            mine = stack.layers if layers is None else overlap(stack.layers, layers)
            last = stack is self.stacks[-1]
            if not mine or (cache is not None and not last and not batch.streams[index].slots):
                continue
            if mine.start == stack.layers.start:  # what the stack before has left is the memory
                memory = [self.to_memory(hidden) for hidden in out[-1:]]
                hidden = self.embed(index, batch)
            else:
                *memory, hidden = out
            hidden = self.run_layers(
                hidden, self.context(index, batch), mine, *memory, cache=cache if last else None
            )
            out = (*memory, hidden)
        return out

    def context(self, index: int, batch: Batch) -> Context:
        """Returns what the layers of stack `index` share. Made once for each micro-batch and stack."""
        model, stack, stream = self.settings, self.stacks[index], batch.streams[index]
        rotary = bias = None
        if model.position_encoding == "rope":
            dtype = torch.promote_types(self.dtype, torch.float32)
            size, base, scaling = head_size(model), model.rope_base, model.rope_scaling
            rotary = rotary_tables(stream.token_positions, size, base, dtype, scaling)
        elif model.position_encoding == "relative":
            table = self.sharding.local(self.relative_bias[stack.stream]).to(self.dtype)
            bias = RelativeBias(table, stack.bidirectional_bias, model.relative_max_distance)
        keys, first = self._dropout_keys(batch), self._first(stream)
        return Context(stream.parts, stream.cross, stream.positions, rotary, bias, keys, first)

    def embed(self, index: int, batch: Batch) -> torch.Tensor:
        """Returns the input [B, S, D] of stack `index`'s first layer."""
        stream, name = batch.streams[index], self.stacks[index].stream
        dtype = self.dtype
        x_BSD = self.embedding(stream.tokens).to(dtype)
        if name in self.positions:
            x_BSD = x_BSD + self.positions[name](stream.token_positions).to(dtype)
        if self.segments is not None:
            segments = stream.segments
            kinds = torch.zeros_like(stream.tokens) if segments is None else segments
            x_BSD = x_BSD + self.segments(kinds).to(dtype)
        if name in self.embedding_norm:
            x_BSD = self.embedding_norm[name](x_BSD)
        keys = self._dropout_keys(batch)
        if keys is not None:
            key_B = keys.of(f"embedding.{name}")
            x_BSD = dropout(x_BSD, key_B, self.settings.dropout, first=self._first(stream))
        return x_BSD

    def run_layers(
        self,
        x_BSD: torch.Tensor,
        context: Context,
        layers: range,
        memory: torch.Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Runs layers of one stack, by global index: [B, S, D] to [B, S, D]. memory: of `to_memory`."""
        if cache is not None and memory is None:
            few = few_tokens(self.settings, self.layers, layers, cache)
            if few is not None and few.serves(x_BSD, context):
                return few.run(x_BSD, context)
        if memory is not None:
            memory = self.sharding.gather_memory(memory)
        for index in layers:
            if cache is not None:
                context = replace(context, cache=cache.layer(index))
            key = None if context.dropout is None else context.dropout.of(f"layers.{index}")
            x_BSD = self.layers[str(index)](x_BSD, context, memory, key)
        return x_BSD

    def to_memory(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what a decoder attends to, from the output of its encoder's last layer."""
        return hidden if self.encoder_norm is None else self.encoder_norm(hidden)

    def head(
        self, hidden_BSD: torch.Tensor, batch: Batch, text_tokens: torch.Tensor | None = None
    ) -> TargetLosses:
        """Returns the losses [B, M] from the last layer's output. Runs on `batch.head_rows` alone."""
        B, M = batch.target_index.shape
        slot_R = batch.head_rows
        hidden_RD = self.target_rows(hidden_BSD, batch)
        weight_vD, bias_v = self.sharding.local(self._output_weight), None
        if self.output_bias is not None:
            bias_v = self.sharding.local(self.output_bias.to(hidden_RD.dtype))
        losses = cross_entropy(
            hidden_RD,
            weight_vD,
            bias_v,
            batch.target_tokens.flatten()[slot_R],
            vocabulary_size=self.settings.vocabulary_size,
            text_tokens=text_tokens,
            slope=self.slope,
            **self.sharding.vocabulary(len(weight_vD)),
        )
        used = slot_R[: batch.head_count]

        def to_slots(loss_R: torch.Tensor) -> torch.Tensor:
            return loss_R.new_zeros(B * M).index_copy(0, used, loss_R[: len(used)]).view(B, M)

        return losses.map(to_slots)

    def target_rows(self, hidden_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns what the output layer multiplies of `batch.head_rows`, [R, D]."""
        hidden_BSD = self.sharding.gather_sequence(hidden_BSD)
        if self.deal_rows is not None:
            hidden_BSD = self.deal_rows(hidden_BSD)
        slot_R, M = batch.head_rows, batch.target_index.shape[1]
        row_R = slot_R // M * hidden_BSD.shape[1] + batch.target_index.flatten()[slot_R]
        return self.before_output(hidden_BSD.flatten(0, 1).index_select(0, row_R))

    def logits(self, batch: Batch) -> torch.Tensor:
        """Returns all logits of the last stream, [B, S, vocabulary_size]: for tests and conversion
        checks of a model that one process holds."""
        return self.row_logits(self.before_output(self.hidden(batch)))

    def row_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits [..., vocabulary_size], in fp32 at least, of what the output layer multiplies,
        [..., D]. Every rank that shares the vocabulary gets all of them."""
        logits = self.sharding.logits(hidden, self._output_weight, self.output_bias)
        return logits[..., : self.settings.vocabulary_size]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream and of products: `compute_dtype`, else the parameters'."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def _output_weight(self) -> torch.Tensor:
        return (self.embedding if self.output is None else self.output).weight

    def before_output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what the output layer multiplies, from the last layer's output."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.head_transform is not None:
            hidden = self.head_transform(hidden)
        scale = self.settings.output_scale
        return hidden if scale is None else hidden * scale

    def _first(self, stream: Stream) -> int:
        """Returns the slot of the row whose hidden state is the first one held here."""
        return stream.first + self.sharding.first_token(stream.tokens.shape[1])

    def _dropout_keys(self, batch: Batch) -> DropoutKeys | None:
        if not self.training or self.settings.dropout == 0:
            return None
        if self.dropout_step is None:
            raise UserError(
                "dropout is on and no step is known: call model.set_dropout_step(seed, step) "
                "before each training step, or model.eval()"
            )
        return DropoutKeys(*self.dropout_step, batch.sample_index)
