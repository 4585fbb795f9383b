"""How far a token's place can be read off its hidden state: docs/why.md, "Position".

After Haviv et al. 2022, section 4. The text must not tell the place where the model does not. A document begins
with its title, so each window of text is turned in a circle by random numbers of tokens: every token of it then
stands at every place equally often, whatever stands around it.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from megaarch.data.batch import Batch
from megaarch.errors import UserError
from megaarch.evaluation.record_schema import Record
from megaarch.probes.catalogue import Options
from megaarch.probes.estimate import Estimate, ratio
from megaarch.probes.hidden_states import states_by_stack, used_slots
from megaarch.probes.probed_model import Rows, Subject

TURNS = 8  # of each window
BATCH = 32  # rows of a forward pass
WIDTH, STEPS, TOKENS, RATE = 128, 400, 512, 1e-2  # of the network that is trained, and of its steps


class Layer(Record):
    """distance: between a token's place and what the network says, in tokens. of_chance: the same over what
    these answers would give if they told nothing, 1 where they tell nothing."""

    distance: Estimate
    of_chance: Estimate


class Stream(Record):
    """places: slots that hold text. chance: the mean distance of two of them, (n^2 - 1) / (3n) of n slots in
    a row. layers: of the embedding and behind each layer."""

    places: int
    chance: float
    layers: list[Layer]


class Positions(Record):
    """streams: by name, e.g. "encoder" and "decoder"."""

    streams: dict[str, Stream]


class States(NamedTuple):
    """Hidden states of text: of_layers [1 + L, T, D], of the embedding and behind each layer; places and rows,
    int [T], the slot and the row of each."""

    of_layers: torch.Tensor
    places: np.ndarray
    rows: np.ndarray


def measure(subject: Subject, options: Options) -> Positions:
    """Trains on the states of one half of the documents, and measures on those of the other half."""
    length = options.length_of(subject)
    rng = np.random.default_rng(options.seed)
    rows = turned(subject.rows(length, options.rows), TURNS, rng)
    names = rng.permutation(np.unique(rows.documents))
    if len(names) < 2:
        raise UserError(
            "position learns from some documents and tests on others, and one alone has rows: give a "
            "lower --length or more --rows"
        )
    test = np.isin(rows.documents, names[: len(names) // 2])
    return Positions(
        streams={
            name: _stream(states, rows.documents, test, options.seed)
            for name, states in states_of(subject, rows).items()
        }
    )


def turned(rows: Rows, turns: int, rng: np.random.Generator) -> Rows:
    """Returns each row `turns` times, each time turned in a circle by a random number of tokens."""
    by = rng.integers(rows.tokens.shape[1], size=(turns, len(rows.tokens)))
    tokens = [np.roll(row, k) for shifts in by for row, k in zip(rows.tokens, shifts, strict=True)]
    return Rows(np.stack(tokens), np.tile(rows.documents, turns))


def states_of(subject: Subject, rows: Rows) -> dict[str, States]:
    """Returns the states of the text in rows, half of each the prefix, by stream."""
    model, vocabulary = subject.model, subject.vocabulary
    found: dict[str, list[States]] = {stack.stream: [] for stack in model.stacks}
    for first in range(0, len(rows.tokens), BATCH):
        batch = subject.batch(rows.tokens[first : first + BATCH], rows.tokens.shape[1] // 2)
        batch = unmasked(batch, vocabulary.mask)
        by_stack = states_by_stack(model, batch)
        for of_stream, stream, layers in zip(found.values(), batch.streams, by_stack, strict=True):
            row, place = np.nonzero(vocabulary.text[stream.tokens.numpy()] & used_slots(stream))
            kept = torch.stack([each[row, place].float() for each in layers])
            of_stream.append(States(kept, place, first + row))
    return {
        name: States(
            torch.cat([s.of_layers for s in each], dim=1),
            np.concatenate([s.places for s in each]),
            np.concatenate([s.rows for s in each]),
        )
        for name, each in found.items()
    }


def unmasked(batch: Batch, mask: int) -> Batch:
    """Returns a batch that shows the tokens which it masks and asks for: a mask at a fixed place would tell
    where the others are."""
    stream = batch.streams[-1]
    row, slot = np.nonzero(batch.target_weights.numpy())
    place = batch.target_index[row, slot]
    shown = stream.tokens.clone()
    hidden = shown[row, place] == mask
    shown[row, place] = torch.where(hidden, batch.target_tokens[row, slot], shown[row, place])
    return replace(batch, streams=(*batch.streams[:-1], replace(stream, tokens=shown)))


def _stream(states: States, documents: np.ndarray, test: np.ndarray, seed: int) -> Stream:
    """documents, test: of each row, [N]: its document, and whether it is one to test on."""
    slots = np.unique(states.places)
    apart = np.abs(slots[:, None] - slots)
    label = np.searchsorted(slots, states.places)
    tested = test[states.rows]
    of = documents[states.rows[tested]]
    layers = []
    for layer in states.of_layers:
        said = answers(layer[~tested], label[~tested], layer[tested], classes=len(slots), seed=seed)
        distance, guessed = apart[said, label[tested]], apart[said].mean(1)
        of_chance = ratio(distance, guessed, of)
        layers.append(Layer(distance=ratio(distance, np.ones(len(said)), of), of_chance=of_chance))
    return Stream(places=len(slots), chance=float(apart.mean()), layers=layers)


def answers(
    train: torch.Tensor, labels: np.ndarray, test: torch.Tensor, *, classes: int, seed: int
) -> np.ndarray:
    """Returns the class that a two-layer ReLU network gives each state in `test` [N, D], trained on the states
    `train` [M, D] and their labels."""
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    of = torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(train.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes)
        )
        optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
        for _ in range(STEPS):
            some = torch.randint(len(train), (TOKENS,))
            optimizer.zero_grad()
            F.cross_entropy(network(train[some]), of[some]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return network(test).argmax(1).numpy()
