"""In-context linear regression: what each mask learns of y = w·x + noise from the examples in its row.

Garg et al. 2022 train transformers on rows of fresh w; von Oswald et al. 2023 show that a layer of linear
attention can be a step of gradient descent on the examples; by Ding et al. 2024 layers with a prefix mask
are steps over all examples, which end in least squares, and layers with a causal mask are steps of online
descent, which do not. So models of equal depth, parameters, steps and data are trained here and held
against least squares, ridge regression and one step of gradient descent.

Every model has its loss at queries behind all examples of a row. Then masks alone differ, and so it is what
Ding et al. compare; a decoder trained at every place, as Garg et al. do, is `every` (on as many targets).
Letters of shapes: docs/shapes.md; X is the dimensions of x.
"""

import math
import sys
from collections.abc import Callable
from typing import Annotated, NamedTuple, get_args

import numpy as np
import torch
from pydantic import Field

from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.evaluation.record_schema import Record
from megaarch.probes.catalogue import Options
from megaarch.probes.estimate import Estimate, over_rows, over_seeds, ratio
from megaarch.probes.regressor import Architecture, Attention, Regressor

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
TEST_ROWS = 256  # that a model predicts at a time


class Regression(schema.Section):
    """What is trained and measured.

    examples: of a row at most, and `fewest` at least; each training step draws how many its rows have.
    noise: deviation of y.
    layers: of a decoder; an encoder-decoder has the stacks that come nearest to its parameters.
    queries: of a row, each a target. counts: of examples at which errors are measured. problems: rows
    that they are measured on, the same for all. every: causal decoders are trained behind every number
    of examples of a row, not behind all alone.
    """

    dimensions: schema.Width = 20
    examples: schema.Number = 40
    fewest: schema.Number = 1
    noise: schema.Rate = 1.0
    architectures: Annotated[tuple[Architecture, ...], Field(strict=False)] = ARCHITECTURES
    attention: Attention = "linear"
    every: bool = False
    layers: schema.Layers = 4
    hidden_size: schema.Width = 32
    heads: schema.Width = 1
    steps: schema.Positive = 2500
    rows: schema.Rows = 64
    queries: schema.Number = 4
    learning_rate: schema.Rate = 3e-3
    seeds: Annotated[tuple[schema.NonNegative, ...], Field(strict=False, min_length=1)] = (0, 1, 2)
    counts: Annotated[tuple[schema.Number, ...], Field(strict=False)] = (
        1,
        5,
        10,
        15,
        20,
        25,
        30,
        40,
    )
    problems: schema.Number = 1000


class Learner(Record):
    """Squared errors of the predictions of w·x, over the dimensions (0 predicts with an error of 1), by
    the number of examples; and their ratio to those of least squares."""

    parameters: int | None = None
    error: dict[str, Estimate]
    ratio: dict[str, Estimate]


class Regressed(Record):
    """settings: a Regression. learners: models by architecture, and least_squares, ridge (at the
    optimum of this noise) and gradient_step (of the best size)."""

    settings: Regression
    learners: dict[str, Learner]


class Problems(NamedTuple):
    """Rows of examples (x [B, S, X], y [B, S]) and of queries [B, Q, X], with w·x [B, Q] there."""

    x: torch.Tensor
    y: torch.Tensor
    queries: torch.Tensor
    truth: torch.Tensor


def draw(settings: Regression, rows: int, examples: int, generator: torch.Generator) -> Problems:
    """Draws w and x from the standard normal, and the examples' noise."""
    w = torch.randn(rows, settings.dimensions, generator=generator)
    x = torch.randn(rows, examples, settings.dimensions, generator=generator)
    queries = torch.randn(rows, settings.queries, settings.dimensions, generator=generator)
    y = at(w, x) + settings.noise * torch.randn(rows, examples, generator=generator)
    return Problems(x, y, queries, at(w, queries))


def at(w_BX: torch.Tensor, x_BSX: torch.Tensor) -> torch.Tensor:
    """Returns w·x, [B, S]."""
    return torch.einsum("bx,bsx->bs", w_BX, x_BSX)


def least_squares(x_BSX: torch.Tensor, y_BS: torch.Tensor) -> torch.Tensor:
    """Returns the w of least norm among those of the least squared error, [B, X]."""
    return torch.einsum("bxs,bs->bx", torch.linalg.pinv(x_BSX), y_BS)


def ridge(x_BSX: torch.Tensor, y_BS: torch.Tensor, penalty: float) -> torch.Tensor:
    """Returns the w of least |y - x w|^2 + penalty |w|^2, [B, X]. With the noise's variance as its
    penalty it is the mean of w given the examples: no predictor has a smaller error."""
    if penalty == 0:
        return least_squares(x_BSX, y_BS)
    square = x_BSX.transpose(1, 2) @ x_BSX + penalty * torch.eye(x_BSX.shape[2]).to(x_BSX)
    return torch.linalg.solve(square, torch.einsum("bsx,bs->bx", x_BSX, y_BS))


def gradient_step(x_BSX: torch.Tensor, y_BS: torch.Tensor, size: float) -> torch.Tensor:
    """Returns w after a step from 0 down the mean of (y - w·x)^2 / 2, [B, X]."""
    return size / y_BS.shape[1] * torch.einsum("bsx,bs->bx", x_BSX, y_BS)


def best_size(settings: Regression, examples: int) -> float:
    """Returns the size of that step which leaves the least expected error: E[w·g] / E[g·g] of the
    gradient g at 0, where E[w·g] = X and E[g·g] = X (1 + (X + 1 + noise^2) / S)."""
    return 1 / (1 + (settings.dimensions + 1 + settings.noise**2) / examples)


Reference = Callable[[Regression, torch.Tensor, torch.Tensor], torch.Tensor]
REFERENCES: dict[str, Reference] = {
    "least_squares": lambda settings, x, y: least_squares(x, y),
    "ridge": lambda settings, x, y: ridge(x, y, settings.noise**2),
    "gradient_step": lambda settings, x, y: gradient_step(x, y, best_size(settings, y.shape[1])),
}


def model_of(settings: Regression, architecture: Architecture, seed: int) -> Regressor:
    """Returns an untrained model. Decoders are alike but for their masks."""
    linear = settings.attention == "linear"
    encoder, decoder = None, None
    if architecture == "encoder_decoder":
        encoder, decoder = stack_layers(settings.layers, settings.attention)
    model = schema.Model(
        architecture=architecture,
        layers=settings.layers,
        encoder_layers=encoder,
        decoder_layers=decoder,
        hidden_size=settings.hidden_size,
        heads=settings.heads,
        feed_forward_size=4 * settings.hidden_size,
        activation="gelu",
        vocabulary_size=1,
        position_encoding="none",
        final_normalization=not linear,
        initial_deviation=0.1 if linear else 0.02,
    )
    return Regressor(model, settings.attention, settings.dimensions, settings.examples, seed)


def stack_layers(layers: int, attention: Attention) -> tuple[int, int]:
    """Returns the layers of an encoder and a decoder that have about the parameters of a decoder of
    `layers`, and of several such pairs the one of the most equal stacks."""
    plain, crossed = (1, 2) if attention == "linear" else (3, 4)  # in 4 D^2, without norms
    pairs = [(a, b) for a in range(1, layers + 1) for b in range(1, layers + 1)]
    off = {(a, b): abs(a * plain + b * crossed - layers * plain) for a, b in pairs}
    return min(pairs, key=lambda pair: (off[pair], abs(pair[0] - pair[1])))


def train(settings: Regression, architecture: Architecture, seed: int) -> Regressor:
    """Trains a model on rows drawn anew each step; the rows of a seed are the same for all models."""
    model = model_of(settings, architecture, seed)
    every = settings.every and architecture == "causal_decoder"
    generator = torch.Generator().manual_seed(2 * seed + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    warmup = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / settings.steps)) / 2),
    )
    for step in range(settings.steps):
        number = int(
            torch.randint(settings.fewest, settings.examples + 1, (1,), generator=generator)
        )
        x, y, queries, truth = draw(settings, settings.rows, number, generator)
        loss = ((model(x, y, queries, every) - truth) ** 2).mean() / settings.dimensions
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            told = f"{architecture}, seed {seed}: step {step + 1}, loss {loss.item():.4f}"
            print(told, file=sys.stderr)
    return model


def measure(options: Options) -> Regressed:
    """Runs the settings' defaults. No option of `megaarch probe` changes them: tools/regression.py has them
    all."""
    return compare(Regression())


def compare(settings: Regression) -> Regressed:
    """Trains every architecture with every seed, telling how far it is, and measures all on the same problems.

    UserError for numbers of examples that no model is trained on.
    """
    if settings.fewest > settings.examples:
        raise UserError(
            f"fewest: rows of {settings.examples} examples at most have not {settings.fewest}"
        )
    if not all(count <= settings.examples for count in settings.counts):
        raise UserError(
            f"counts: errors are measured at 1 to {settings.examples} examples, which rows of training "
            f"have, not at {', '.join(map(str, settings.counts))}"
        )
    tests = {count: _test(settings, count) for count in settings.counts}
    references = {
        name: {count: _of_reference(settings, fit, test) for count, test in tests.items()}
        for name, fit in REFERENCES.items()
    }
    bound = references["least_squares"]
    learners = {name: _learner([found], bound) for name, found in references.items()}
    for architecture in settings.architectures:
        models = [train(settings, architecture, seed) for seed in settings.seeds]
        found = [{n: _of_model(model, test) for n, test in tests.items()} for model in models]
        learners[architecture] = _learner(found, bound, models[0].count)
    return Regressed(settings=settings, learners=learners)


def _test(settings: Regression, count: int) -> Problems:
    generator = torch.Generator().manual_seed(2 * count)  # those of training are odd
    return draw(settings, settings.problems, count, generator)


def _of_reference(settings: Regression, fit: Reference, test: Problems) -> np.ndarray:
    w = fit(settings, test.x.double(), test.y.double())
    return _squared(at(w, test.queries.double()), test)


@torch.no_grad()
def _of_model(model: Regressor, test: Problems) -> np.ndarray:
    parts = zip(*(values.split(TEST_ROWS) for values in test[:3]), strict=True)
    return _squared(torch.cat([model(*part) for part in parts]), test)


def _squared(predictions: torch.Tensor, test: Problems) -> np.ndarray:
    """Mean squared error of each problem's queries, over the dimensions, float64 [B]."""
    errors = (predictions - test.truth).double() ** 2
    return errors.mean(1).div(test.x.shape[2]).numpy()


def _learner(
    seeds: list[dict[int, np.ndarray]], bound: dict[int, np.ndarray], parameters: int | None = None
) -> Learner:
    """seeds: the errors of each problem by number of examples, for each seed. An error that is not finite is
    no row to leave out: a mean without it would favour the model that diverged, so there is none."""
    error, of_bound = {}, {}
    for count, least in bound.items():
        problems = np.arange(len(least))
        if not all(np.isfinite(found[count]).all() for found in seeds):
            error[str(count)] = of_bound[str(count)] = Estimate(value=None)
            continue
        error[str(count)] = over_seeds([over_rows(found[count], problems) for found in seeds])
        of_bound[str(count)] = over_seeds([ratio(found[count], least, problems) for found in seeds])
    return Learner(parameters=parameters, error=error, ratio=of_bound)
