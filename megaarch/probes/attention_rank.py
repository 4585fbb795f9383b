"""The rank of trained attention, and how fast the states of a row become alike: docs/why.md, "Rank"."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch

from megaarch.attention.mask import CAUSAL, FULL, Parts
from megaarch.config.matmuls import head_size
from megaarch.data.batch import Batch
from megaarch.evaluation.record_schema import Record
from megaarch.model.layers import Layer
from megaarch.model.transformer import Transformer
from megaarch.probes import matrix_rank
from megaarch.probes.attention_weights import (
    causal_mask,
    full_mask,
    key_counts,
    recorded_attention,
    same,
)
from megaarch.probes.catalogue import Options
from megaarch.probes.estimate import Estimate, over_rows
from megaarch.probes.hidden_states import states_by_stack
from megaarch.probes.probed_model import Subject
from megaarch.probes.random_attention import matched_attention, random_attention, uniform_attention

BATCH = 8  # rows of a forward pass, all of whose matrices are kept; random matrices stand beside the first
MASKS = {"causal": causal_mask, "full": full_mask}
SWITCHES = {
    "whole": {},
    "no_feed_forward": {"feed_forward": False},
    "no_skip": {"skip": False},
    "attention_alone": {"skip": False, "feed_forward": False},
}
FLOOR = 1e-24  # of smallest over largest: far below what fp64 can tell from a singular matrix
NORMS = {"frobenius": matrix_rank.frobenius_norm, "composite": matrix_rank.composite_norm}
Values = dict[tuple[str, ...], np.ndarray]  # of each measure [L, H], by its path in Attention


class Spectrum(Record):
    """Ranks are shares of the lesser side, so that lengths compare. numerical_rank: by tolerance, relative to
    the largest singular value. log10_smallest_over_largest: of singular values; that of a matrix of less than
    full rank is rounding."""

    numerical_rank: dict[str, Estimate]
    stable_rank: Estimate
    effective_rank: Estimate
    log10_smallest_over_largest: Estimate


class Attention(Record):
    """Means over matrices. without_mean_row: of A - 1 a'. entropy: of rows, as a share of the logarithm of
    the keys that they see."""

    matrix: Spectrum
    without_mean_row: Spectrum
    entropy: Estimate


class Block(Record):
    """queries, keys: of the first row. trained: over all layers and heads; layers: over heads; heads: of each
    layer. masks: the same weights, the network being run under another mask. random: Gaussian q and k under
    either mask; matched: the same, each as sharp as a trained matrix; uniform: all that the mask shows alike.
    lost_by_seeing_ahead: effective rank of the same weights under the causal mask less that under the full one."""

    queries: int
    keys: int
    trained: Attention
    layers: list[Attention]
    heads: list[list[Attention]]
    masks: dict[str, Attention]
    random: dict[str, Attention] = {}  # noqa: RUF012  # pydantic copies it
    matched: dict[str, Attention] = {}  # noqa: RUF012
    uniform: dict[str, Attention] = {}  # noqa: RUF012
    lost_by_seeing_ahead: Estimate | None = None


class Ranks(Record):
    """blocks: attention by stream, e.g. "decoder": its keys are all tokens but XLNet's queries; of a decoder
    also "decoder.prefix" and "decoder.rest", its two square blocks (of a causal one its halves), the latter's rows
    divided by their sums (where a row's is 0, to fp64, its matrix counts nowhere); of one that attends to an encoder
    "decoder.cross". residual: ||X - 1 x'|| / ||X|| of hidden states, by stream, what is switched off, and norm: of the
    embedding and behind each layer of the stack."""

    blocks: dict[str, Block]
    residual: dict[str, dict[str, dict[str, list[Estimate]]]]


def measure(subject: Subject, options: Options) -> Ranks:
    """Measures attention and hidden states on rows of held-out text, half of each the prefix."""
    length = options.length_of(subject)
    rows = subject.rows(length, options.rows)
    generator = torch.Generator().manual_seed(options.seed)
    found: dict[str, dict[str, list[Values]]] = {}
    residual: dict[tuple[str, str, str], list[torch.Tensor]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for first in range(0, len(rows.tokens), BATCH):
        batch = subject.batch(rows.tokens[first : first + BATCH], length // 2)
        for kind, name, matrices in _matrices(subject.model, batch, first == 0, generator):
            found.setdefault(name, {}).setdefault(kind, []).extend(map(measured, matrices))
            sizes.setdefault(name, (matrices[0].shape[-2], matrices[0].shape[-1]))
        for key, of_layers in residuals(subject.model, batch).items():
            residual.setdefault(key, []).append(of_layers)
    made: dict[str, dict[str, dict[str, list[Estimate]]]] = {}
    for (stream, switch, norm), of_batches in residual.items():
        layers = torch.cat(of_batches, dim=1).numpy()
        made.setdefault(stream, {}).setdefault(switch, {})[norm] = [
            over_rows(values, rows.documents) for values in layers
        ]
    blocks = {name: _block(name, sizes[name], found[name], rows.documents) for name in found}
    return Ranks(blocks=blocks, residual=made)


def _matrices(
    model: Transformer, batch: Batch, control: bool, generator: torch.Generator
) -> Iterator[tuple[str, str, list[torch.Tensor]]]:
    """Yields matrices [L, H, n, m], of rows in their order, with their kind and block: "trained",
    "masks.causal", ..."""
    trained = blocks(model, batch)
    for name, rows in trained.items():
        yield "trained", name, rows
    for mask, changed in MASKS.items():
        streams = batch.streams
        own = all(np.array_equal(changed(s.parts).dense(), s.parts.dense()) for s in streams)
        for name, rows in (trained if own else blocks(model, batch, changed)).items():
            yield f"masks.{mask}", name, rows
    if not control:
        return
    for name, (matrices, *_) in trained.items():
        queries, keys = matrices.shape[-2:]
        for mask in MASKS if queries == keys else ():
            yield f"uniform.{mask}", name, [uniform_attention(mask, keys)]
    size = head_size(model.settings)
    for name in [stack.stream for stack in model.stacks]:
        for matrices in trained[name]:
            for mask in MASKS:
                drawn = random_attention(matrices[:1], size, mask, generator)
                yield f"random.{mask}", name, [drawn]
                drawn = matched_attention(matrices, size, mask, generator)
                yield f"matched.{mask}", name, [drawn]


def blocks(
    model: Transformer, batch: Batch, mask: Callable[[Parts], Parts] = same
) -> dict[str, list[torch.Tensor]]:
    """Returns the matrices [L, H, n, m] of each row, by block (see Ranks), under the model's own mask or another."""
    found: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad(), recorded_attention(model, mask) as weights:
        model.run(batch)
    for stack, stream in zip(model.stacks, batch.streams, strict=True):
        layers = cast(list[Layer], [model.layers[str(index)] for index in stack.layers])
        own = torch.stack([weights[layer.attention] for layer in layers])
        for row, n in enumerate(key_counts(stream.parts)):
            matrices = own[:, row, :, :n, :n]
            found.setdefault(stack.stream, []).append(matrices)
            prefix = prefix_length(stream.parts, row, n) if stream.cross is None else 0
            if prefix:
                rest = matrices[..., prefix:, prefix:]
                rest = rest / rest.sum(-1, keepdim=True)
                square = matrices[..., :prefix, :prefix]
                found.setdefault(f"{stack.stream}.prefix", []).append(square)
                found.setdefault(f"{stack.stream}.rest", []).append(rest)
        if stream.cross is not None:
            crossed = filter(None, (layer.cross_attention for layer in layers))
            cross = torch.stack([weights[module] for module in crossed])
            ends = stream.cross.table[..., [2, 4]].max(axis=1)
            found[f"{stack.stream}.cross"] = [
                cross[:, row, :, :queries, :keys] for row, (queries, keys) in enumerate(ends)
            ]
    return found


def prefix_length(parts: Parts, row: int, keys: int) -> int:
    """Returns how many tokens of a decoder's row condition the others: those that see each other and not the
    others, of a causal row the first half; 0 where every token sees every other."""
    of_row = parts.row(row)
    ends = [end for shape, _, end, _, _ in of_row if shape == FULL and end < keys]
    causal = all(shape == CAUSAL for shape, *_ in of_row)
    return max(ends, default=keys // 2 if causal else 0)


def measured(matrices: torch.Tensor) -> Values:
    """Returns every measure of matrices [L, H, n, m] by its path in Attention, [L, H] each; NaN of a matrix with a
    row that has no weights (see Ranks), which is counted nowhere."""
    least, known = min(matrices.shape[-2:]), matrices.isfinite().all(-1).all(-1)
    matrices = torch.where(known[..., None, None], matrices, 0.0)
    found: dict[tuple[str, ...], torch.Tensor] = {
        ("entropy",): matrix_rank.row_entropy(matrices).nanmean(-1)
    }
    for kind, each in (
        ("matrix", matrices),
        ("without_mean_row", matrix_rank.without_mean_row(matrices)),
    ):
        values = torch.linalg.svdvals(each)
        for tolerance in matrix_rank.TOLERANCES:
            rank = matrix_rank.numerical_rank(values, tolerance) / least
            found[kind, "numerical_rank", f"{tolerance:g}"] = rank
        found[kind, "stable_rank"] = matrix_rank.stable_rank(values) / least
        found[kind, "effective_rank"] = matrix_rank.effective_rank(values) / least
        least_over_largest = matrix_rank.smallest_over_largest(values).clamp(min=FLOOR)
        found[kind, "log10_smallest_over_largest"] = least_over_largest.log10()
    return {path: torch.where(known, value, torch.nan).numpy() for path, value in found.items()}


def _block(
    name: str, size: tuple[int, int], found: Mapping[str, list[Values]], documents: np.ndarray
) -> Block:
    """found: the values of each row, by kind."""
    kinds = {  # [N, L, H]
        kind: {measure: np.stack([values[measure] for values in rows]) for measure in rows[0]}
        for kind, rows in found.items()
    }
    trained = kinds.pop("trained")
    under: dict[str, dict[str, Attention]] = {}
    for kind, values in kinds.items():
        above, mask = kind.split(".")
        under.setdefault(above, {})[mask] = estimated(values, documents)
    layers, heads = trained["entropy",].shape[1:]
    causal, full = (kinds[f"masks.{mask}"]["matrix", "effective_rank"] for mask in MASKS)
    own = "." not in name
    return Block(
        queries=size[0],
        keys=size[1],
        trained=estimated(trained, documents),
        layers=[estimated(trained, documents, np.s_[:, i]) for i in range(layers)],
        heads=[
            [estimated(trained, documents, np.s_[:, i, j]) for j in range(heads)]
            for i in range(layers)
        ],
        **under,
        lost_by_seeing_ahead=over_rows((causal - full).mean((1, 2)), documents) if own else None,
    )


def estimated(values: Values, documents: np.ndarray, of: Any = np.s_[:]) -> Attention:
    """Returns the means of measures [N, L, H] over the matrices `of` each row, with intervals over rows."""

    made: dict[str, Any] = {}
    for (*above, name), each in values.items():
        within = made
        for key in above:
            within = within.setdefault(key, {})
        means = torch.from_numpy(each[of]).reshape(len(each), -1).nanmean(1).numpy()
        within[name] = over_rows(means, documents[: len(means)])
    return Attention.model_validate(made)


def residuals(model: Transformer, batch: Batch) -> dict[tuple[str, str, str], torch.Tensor]:
    """Returns the residual to rank one [1 + L, B] of each stream, switch and norm: of the embedding and behind
    each layer."""
    found = {}
    for switch, off in SWITCHES.items():
        by_stack = states_by_stack(model, batch, **off)
        for stack, stream, states in zip(model.stacks, batch.streams, by_stack, strict=True):
            layers, lengths = torch.stack(states), key_counts(stream.parts)
            rows = [layers[:, row, :n] for row, n in enumerate(lengths)]
            for name, norm in NORMS.items():
                each = [matrix_rank.residual_to_rank_one(row, norm) for row in rows]
                found[stack.stream, switch, name] = torch.stack(each, dim=1)
    return found
