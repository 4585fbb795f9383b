"""Whether demonstrations in a prompt change attention as finetuning on them does (Dai et al. 2022, section 4).

For each query three settings are compared at the row off which the answer's first token is read: the query
alone (zero-shot), behind demonstrations (in context), and alone in a copy of the model that was finetuned on
these demonstrations, a step of gradient descent each, in order, of the key and value projections alone.

    SimAOU  cosine of (h_context - h_zero) and (h_finetuned - h_zero), where h is the output of a layer's
            attention at that row, divided by its norm
    SimAM   cosine of m_context and m_finetuned, where m are the scores before softmax, of a head and that row,
            of the keys of the query; keys of demonstrations are left out. Where a form cuts spans out of
            the prompt (T5's), a query's keys are not the same in all settings, and there is no SimAM

Attention is a decoder's own, and beside an encoder that to its output: there demonstrations reach the answer.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from megaarch.attention.kernel_interface import AttentionInputs
from megaarch.data.batch import Batch
from megaarch.data.conditional_forms import ADDED
from megaarch.errors import UserError
from megaarch.evaluation.record_schema import Record
from megaarch.ingest.tasks.task import Task, find
from megaarch.ingest.tasks.template import BETWEEN, Question
from megaarch.model.fused_projections import projections
from megaarch.model.layers import CrossAttention, Layer, SelfAttention
from megaarch.model.transformer import Transformer
from megaarch.probes.attention_weights import attending, inputs_of
from megaarch.probes.catalogue import Options
from megaarch.probes.estimate import Estimate, over_rows
from megaarch.probes.probed_model import Subject

SHOTS = 4
LEARNING_RATE = 1e-2  # of a demonstration's step
Tokens = np.ndarray


class Similarity(Record):
    """Means over queries, of SimAM over heads too.

    sim_aou_random: the change by finetuning replaced by a Gaussian one. sim_am_zero_shot: m_context with
    m_zero, before finetuning. sim_am_random: with m_zero and a Gaussian change of the size of finetuning's.
    """

    sim_aou: Estimate
    sim_aou_random: Estimate
    sim_am: Estimate
    sim_am_zero_shot: Estimate
    sim_am_random: Estimate


class InContext(Record):
    """attention: "self" or "cross". layers: by their place in the last stack. mean: over them. tasks:
    names of those whose demonstrations fit a row. shots: of a prompt at most."""

    attention: str
    layers: dict[str, Similarity]
    mean: Similarity
    tasks: list[str]
    shots: int
    learning_rate: float


@dataclass(frozen=True)
class Prompts:
    """A task's demonstrations as (input, answer), their text in front of a query, and the queries."""

    demonstrations: list[tuple[Tokens, Tokens]]
    before: Tokens
    queries: list[tuple[Tokens, Tokens]]


@dataclass(frozen=True)
class Reading:
    """What a layer's attention does at one row. output: [D], of norm 1. scores: [H, keys], before
    softmax, of the keys that the row sees."""

    output: np.ndarray
    scores: np.ndarray


def measure(subject: Subject, options: Options) -> InContext:
    """Compares the three settings, with `options.rows` queries of all tasks together."""
    tasks = [task for path in options.tasks for task in find(path)]
    if not tasks:
        raise UserError("in_context asks tasks: give some with --tasks, e.g. configs/tasks")
    return similarities(subject, tasks, max(options.rows // len(tasks), 2), seed=options.seed)


def similarities(
    subject: Subject, tasks: Sequence[Task], queries: int = 8, shots: int = SHOTS, seed: int = 0
) -> InContext:
    """Compares the three settings on held-out items of tasks; the subject's model stays as it is.

    queries: of a task at most. seed: of demonstrations and Gaussian changes. UserError where no task has
    a demonstration and two queries that fit a row.
    """
    model, rng = subject.model, np.random.default_rng(seed)
    values: list[np.ndarray] = []
    numbers: list[int] = []
    names: list[str] = []
    for number, task in enumerate(tasks):
        prompts = prompts_of(task, subject, queries, shots, seed)
        if prompts is None:
            continue
        demonstrations = [batch_of(subject, *each) for each in prompts.demonstrations]
        tuned = finetuned(model, demonstrations, LEARNING_RATE)
        for asked, answer in prompts.queries:
            alone = batch_of(subject, asked, answer)
            behind = batch_of(subject, np.concatenate([prompts.before, asked]), answer)
            values.append(compared(model, tuned, alone, behind, rng))
            numbers.append(number)
        names.append(task.name)
    if not values:
        raise UserError(
            f"model.sequence_length: no task has a demonstration and two queries that fit rows of "
            f"{subject.settings.model.sequence_length} tokens: give tasks of shorter items"
        )
    # queries of one task share their demonstrations
    of = np.array(numbers) if len(names) > 1 else np.arange(len(values))
    table = np.array(values)
    return InContext(
        attention="cross" if len(model.stacks) > 1 else "self",
        layers={str(i): _similarity(table[:, i], of) for i in range(table.shape[1])},
        mean=_similarity(torch.from_numpy(table).nanmean(1).numpy(), of),
        tasks=names,
        shots=shots,
        learning_rate=LEARNING_RATE,
    )


def _similarity(table: np.ndarray, of: np.ndarray) -> Similarity:
    fields = zip(Similarity.model_fields, table.T, strict=True)
    return Similarity(**{name: over_rows(column, of) for name, column in fields})


def prompts_of(
    task: Task, subject: Subject, queries: int, shots: int, seed: int = 0
) -> Prompts | None:
    """Returns a task's first wording with demonstrations drawn of the items to train on, which fill half
    a row at most, and the first held-out items that fit beside them. None where none or one fits."""
    wording, encode = task.wordings[0], subject.tokenizer.encode
    row = subject.settings.model.sequence_length
    room, separate = row - ADDED, subject.settings.data.objective == "supervised"

    def pair(question: Question) -> tuple[Tokens, Tokens]:
        target = question.target if separate else f" {question.target}"
        return encode(question.input), encode(target)

    before: list[Tokens] = []
    demonstrations: list[tuple[Tokens, Tokens]] = []
    order = random.Random(f"{task.name} {seed}").sample(task.train, len(task.train))
    for question in filter(None, map(wording.question, order)):
        text = encode(f"{question.input} {question.target}{BETWEEN}")
        if sum(map(len, before)) + len(text) <= room // 2:
            before.append(text)
            demonstrations.append(pair(question))
        if len(before) == shots:
            break
    if not before:
        return None
    given = np.concatenate(before)
    asked: list[tuple[Tokens, Tokens]] = []
    for question in filter(None, map(wording.question, task.test)):
        query, answer = pair(question)
        if len(asked) < queries and len(given) + len(query) + len(answer) <= room:
            examples = subject.continuation(np.concatenate([given, query]), answer)
            if all(max(each.positions) <= row for each in examples):
                asked.append((query, answer))
    return Prompts(demonstrations, given, asked) if len(asked) > 1 else None


def batch_of(subject: Subject, asked: Tokens, answer: Tokens) -> Batch:
    """Returns `answer` after `asked` as the objective scores it; a row for each of its examples."""
    return subject.packed(subject.continuation(asked, answer))


def finetuned(model: Transformer, batches: Sequence[Batch], learning_rate: float) -> Transformer:
    """Returns a copy after a step of gradient descent for each batch, in order, down the mean loss of its
    targets. Keys and values alone are projected anew."""
    tuned = copy.deepcopy(model).eval().requires_grad_(False)
    moving: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    for name, parameter in tuned.named_parameters():
        kinds = projections(name, tuned.settings)
        rows = kinds.of_rows(range(parameter.shape[0]))
        wanted = [kind in ("key", "value") for kind in kinds.names]
        if any(wanted):
            parameter.requires_grad_()
            moving.append((parameter, torch.tensor(wanted)[rows]))
    for batch in batches:
        batch = batch.to(moving[0][0].device)
        with torch.enable_grad():
            losses = tuned(batch)
            loss = (losses.nll * batch.target_weights).sum() / batch.target_weights.sum()
            gradients = torch.autograd.grad(loss, [parameter for parameter, _ in moving])
        with torch.no_grad():
            for (parameter, rows), gradient in zip(moving, gradients, strict=True):
                parameter[rows] -= learning_rate * gradient[rows]
    return tuned.requires_grad_(False)


def compared(
    model: Transformer, tuned: Transformer, alone: Batch, behind: Batch, rng: np.random.Generator
) -> np.ndarray:
    """Returns what Similarity has of each layer, float64 [layers, 5], of one query: alone, and behind
    demonstrations. NaN where nothing changes, and SimAM where the query has but one key."""
    zero, context, after = readings(model, alone), readings(model, behind), readings(tuned, alone)
    common = shared_keys(alone, behind)
    found = []
    for z, c, f in zip(zero, context, after, strict=True):
        moved = c.output - z.output
        aou = [_cosine(moved, f.output - z.output), _cosine(moved, rng.normal(size=moved.shape))]
        maps = [np.nan] * 3
        if common > 1:
            m_z, m_c, m_f = (reading.scores[:, -common:] for reading in (z, c, f))
            noise = rng.normal(size=m_z.shape)
            noise *= _norm(m_f - m_z) / _norm(noise)
            maps = [float(np.mean(_cosine(m_c, other))) for other in (m_f, m_z, m_z + noise)]
        found.append([*map(float, aou), *maps])
    return np.array(found)


def readings(model: Transformer, batch: Batch) -> list[Reading]:
    """Returns what each layer of the last stack does at the row off which the first target is read. It is
    cross-attention in a decoder beside an encoder."""
    batch = batch.to(next(model.parameters()).device)
    row, keys = read_off(batch)
    found: list[Reading] = []

    def read(attention: SelfAttention | CrossAttention, attend, *given: Any, **options: Any):
        out = attend(*given, **options)
        scores = scores_of(inputs_of(*given, **options), row)[:, keys].double().cpu().numpy()
        at_row = attention.output(out.flatten(2))[0, row].double().cpu().numpy()
        found.append(Reading(at_row / max(np.linalg.norm(at_row), 1e-300), scores))
        return out

    layers = cast(list[Layer], [model.layers[str(i)] for i in model.stacks[-1].layers])
    attentions = [layer.cross_attention or layer.attention for layer in layers]
    by = {attention: partial(read, attention, attention.attend) for attention in attentions}
    with torch.no_grad(), attending(by):
        model.run(batch)
    return found


def read_off(batch: Batch) -> tuple[int, np.ndarray]:
    """Returns the slot of the last stream off which the first target is read, and the keys that attention
    sees there."""
    first = int(np.flatnonzero(batch.target_weights[0].numpy(force=True))[0])
    row = int(batch.target_index[0, first])
    stream = batch.streams[-1]
    seen = (stream.cross or stream.parts).dense()
    return row, np.flatnonzero(seen[0, row])


def shared_keys(alone: Batch, behind: Batch) -> int:
    """Returns how many of the last keys that both see are of the same tokens."""
    sides = []
    for batch in (alone, behind):
        last = batch.streams[-1]
        tokens = (batch.streams[0] if last.cross is not None else last).tokens[0]
        sides.append(tokens.numpy(force=True)[read_off(batch)[1]][::-1])
    length = min(map(len, sides))
    different = np.flatnonzero(sides[0][:length] != sides[1][:length])
    return int(different[0]) if len(different) else length


def scores_of(inputs: AttentionInputs, row: int) -> torch.Tensor:
    """Returns the scores of one query row before softmax, [H, Sk]."""
    q, k = inputs.q[0, row], inputs.k[0]
    k = k.repeat_interleave(q.shape[0] // k.shape[1], dim=1)
    scores = torch.einsum("hd,khd->hk", q, k) * inputs.scale
    if inputs.bias is not None:
        scores = scores + inputs.bias.block(*inputs.positions)[0, :, row]
    return scores


def _norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine over the last axis; NaN of a vector of norm 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
