"""In-context linear regression: constructed layers against descent written out, references against numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megaarch.config import schema
from megaarch.errors import UserError
from megaarch.probes import in_context_regression
from megaarch.probes.in_context_regression import Regressed, Regression
from megaarch.probes.regressor import Regressor

pytestmark = pytest.mark.slow

ARCHITECTURES = in_context_regression.ARCHITECTURES
RECORD = Path(__file__).parents[2] / "benchmarks" / "2026-11-28-regression.json"


def constructed(architecture: str, layers: int, dimensions: int, size: float, n: int) -> Regressor:
    """von Oswald et al. 2023, proposition 1: queries and keys are x, values are the last number, of
    which every layer subtracts `size` times what attention returns."""
    width = dimensions + 1
    model = schema.Model(
        architecture=architecture,
        layers=layers,
        hidden_size=width,
        heads=1,
        vocabulary_size=1,
        position_encoding="none",
        final_normalization=False,
    )
    made = Regressor(model, "linear", dimensions, n).double()
    of_x, of_y = torch.eye(width).double(), torch.zeros(width, width).double()
    of_x[-1, -1], of_y[-1, -1] = 0, 1
    with torch.no_grad():
        made.read_in.weight.copy_(torch.eye(width))
        made.read_out.weight.copy_(-of_y[-1:])
        for layer in made.transformer.layers.values():
            layer.attention.qkv.weight.copy_(torch.cat([of_x, of_x, of_y]))
            layer.attention.output.weight.copy_(-size * of_y)
    return made


def row(n: int, dimensions: int, queries: int = 2, rows: int = 2) -> in_context_regression.Problems:
    settings = Regression(dimensions=dimensions, examples=n, queries=queries, noise=0.5)
    made = in_context_regression.draw(settings, rows, n, torch.Generator().manual_seed(3))
    return in_context_regression.Problems(*(x.double() for x in made))


def batch_descent(x, y, size, steps):
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        w = w + size / len(y) * sum((y[i] - w @ x[i]) * x[i] for i in range(len(y)))
    return w


def online_descent(x, y, size, steps):
    """Ding et al. 2024: example j has a w of its own, which sums over the examples up to j, each with
    the error that its own, older w leaves."""
    w = np.zeros((len(y) + 1, x.shape[1]))  # the last is that of a query behind all examples
    for _ in range(steps):
        errors = [y[i] - w[i] @ x[i] for i in range(len(y))]
        step = [sum(errors[i] * x[i] for i in range(min(j + 1, len(y)))) for j in range(len(y) + 1)]
        w = w + size / len(y) * np.array(step)
    return w[-1]


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize(
    "architecture, descent", [("prefix_decoder", batch_descent), ("causal_decoder", online_descent)]
)
def test_constructed_linear_layers_are_steps_of_descent(architecture, descent, layers):
    problems, size = row(n=7, dimensions=3), 0.3
    model = constructed(architecture, layers, 3, size, n=7)
    with torch.no_grad():
        found = model(*problems[:3]).numpy()
    x, y, queries, _ = (values.numpy() for values in problems)
    wanted = [queries[b] @ descent(x[b], y[b], size, layers) for b in range(len(x))]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)


def test_one_layer_is_the_reference_of_one_gradient_step():
    x, y, queries, _ = row(n=7, dimensions=3)
    with torch.no_grad():
        found = constructed("causal_decoder", 1, 3, 0.3, n=7)(x, y, queries)
    wanted = in_context_regression.at(in_context_regression.gradient_step(x, y, 0.3), queries)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_a_causal_mask_leaves_later_layers_stale():
    problems = row(n=7, dimensions=3)
    found = []
    for architecture in ("prefix_decoder", "causal_decoder"):
        with torch.no_grad():
            found.append(constructed(architecture, 2, 3, 0.3, n=7)(*problems[:3]))
    assert (found[0] - found[1]).abs().min() > 1e-3


@pytest.mark.parametrize("n", [3, 5, 11])
def test_least_squares_and_ridge_are_numpys(n):
    x, y, *_ = row(n, dimensions=5)
    squares, ridge = (
        in_context_regression.least_squares(x, y),
        in_context_regression.ridge(x, y, 0.25),
    )
    for b in range(len(x)):
        by_numpy = np.linalg.lstsq(x[b], y[b], rcond=None)[0]
        np.testing.assert_allclose(squares[b], by_numpy, atol=1e-9)
        # the penalty as five more examples of 0
        longer = np.vstack([x[b], 0.5 * np.eye(5)]), np.append(y[b], np.zeros(5))
        np.testing.assert_allclose(ridge[b], np.linalg.lstsq(*longer, rcond=None)[0], atol=1e-9)
    np.testing.assert_allclose(in_context_regression.ridge(x, y, 0.0), squares)


@pytest.mark.parametrize("n", [2, 9])
def test_the_best_step_leaves_the_least_error(n):
    settings = Regression(dimensions=4, noise=0.7, queries=1)
    made = in_context_regression.draw(settings, 100_000, n, torch.Generator().manual_seed(0))
    direction = in_context_regression.at(
        in_context_regression.gradient_step(made.x, made.y, 1.0), made.queries
    )
    of_sample = (direction * made.truth).mean() / (direction**2).mean()
    assert in_context_regression.best_size(settings, n) == pytest.approx(of_sample.item(), rel=0.03)


def models(attention: str):
    settings = Regression(dimensions=3, examples=6, hidden_size=16, heads=2, attention=attention)
    for architecture in ARCHITECTURES:
        yield architecture, in_context_regression.model_of(settings, architecture, seed=1).double()


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_only_a_causal_mask_sees_the_order_of_examples(attention):
    x, y, queries, _ = row(n=6, dimensions=3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for architecture, model in models(attention):
        with torch.no_grad():
            moved = (model(x, y, queries) - model(x[:, order], y[:, order], queries)).abs()
        if architecture == "causal_decoder":
            assert moved.max() > 1e-7
        else:
            assert moved.max() < 1e-12


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_every_place_of_a_causal_decoder_sees_the_examples_before_it(attention):
    x, y, queries, _ = row(n=6, dimensions=3, queries=4)
    model = dict(models(attention))["causal_decoder"]
    with torch.no_grad():
        found = model(x, y, queries, every=True)
        for i, seen in enumerate([2, 3, 5, 6]):
            alone = model(x[:, :seen], y[:, :seen], queries[:, i : i + 1])
            torch.testing.assert_close(found[:, i : i + 1], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attention, layers", [("linear", 4), ("softmax", 6)])
def test_models_have_the_same_number_of_parameters(attention, layers):
    settings = Regression(attention=attention, layers=layers)
    counts = [in_context_regression.model_of(settings, each, 0).count for each in ARCHITECTURES]
    assert max(counts) < 1.01 * min(counts)


def test_models_of_a_seed_begin_alike_and_see_the_same_rows():
    settings = Regression(dimensions=2, examples=1, steps=3, hidden_size=8, layers=1)
    one = in_context_regression.train(settings, "causal_decoder", 5)
    other = in_context_regression.train(settings, "prefix_decoder", 5)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # with one example both masks are the same
    third = in_context_regression.train(settings, "causal_decoder", 6)
    assert not torch.equal(one.read_in.weight, third.read_in.weight)


def test_a_model_that_diverges_has_no_error_to_compare():
    """Without its worst row, or its worst seed, it would look better than it is."""
    even = {1: np.ones(4), 2: np.ones(4)}
    bad = {1: np.ones(4), 2: np.array([1.0, np.inf, 1.0, 1.0])}
    found = in_context_regression._learner([even, bad, even], even)
    assert found.error["1"].value == found.ratio["1"].value == 1
    assert found.error["2"].value is found.ratio["2"].value is None


def test_numbers_of_examples_that_no_row_has_are_refused():
    with pytest.raises(UserError, match="1 to 8 examples"):
        in_context_regression.compare(Regression(examples=8, counts=(4, 9)))


SMALL = Regression(
    dimensions=8,
    examples=32,
    fewest=32,
    architectures=("causal_decoder", "prefix_decoder"),
    layers=3,
    steps=500,
    rows=32,
    queries=8,
    seeds=(0,),
    counts=(32,),
    problems=1000,
)


def test_trained_prefix_decoders_reach_least_squares_and_causal_ones_do_less():
    found = in_context_regression.compare(SMALL)
    holds_the_claim(found, "32")
    again = Regressed.model_validate_json(found.model_dump_json())
    assert again == found
    step = found.learners["gradient_step"].error["32"]
    for name in SMALL.architectures:
        assert found.learners[name].error["32"].value < step.value


def test_the_committed_record_holds_the_claim_in_twenty_dimensions():
    found = Regressed.model_validate_json(RECORD.read_text())
    settings = found.settings
    assert (settings.dimensions, settings.examples, len(settings.seeds)) == (20, 40, 3)
    assert json.loads(RECORD.read_text())["command"].startswith("python -m tools.regression")
    holds_the_claim(found, "40")


def holds_the_claim(found: Regressed, count: str) -> None:
    """Each seed's prefix decoder is within 10% of least squares and better than its causal decoder; no
    predictor is better than ridge."""
    prefix, causal = (
        found.learners[name].ratio[count] for name in ("prefix_decoder", "causal_decoder")
    )
    bayes = found.learners["ridge"].ratio[count].value
    for one, other in zip(*(each.seeds or [each.value] for each in (prefix, causal)), strict=True):
        assert 0.99 * bayes < one <= 1.1
        assert other > one
