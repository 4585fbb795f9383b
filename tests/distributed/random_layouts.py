"""Random models, objectives and layouts against one process, in fp64: what no fixed matrix thinks of.

    python -m tests.distributed.random_layouts --cases 200

A case draws an architecture with one of its objectives, the model's options, how rows are made and divided,
and two layouts of at most eight processes, until the settings are ones that a run accepts. Three steps in the
first layout and in one process must have the same gradients, norms, losses and weights within LIMIT, and so must
the losses and weights of a run that takes two steps in the first layout, saves, and two in the second one. A case
that differs is printed with its settings (`--first NUMBER --cases 1` runs it again), and the exit code is 1.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megaarch.config import ConfigError, catalogue
from megaarch.distributed.mesh import processes
from megaarch.errors import UserError
from megaarch.parallel.validate import check
from tests import conftest
from tests.distributed import runs
from tests.distributed.pool import Pool, RankError

LIMIT = 1e-9
MOST = 8  # processes


def draw(rng: random.Random) -> dict[str, Any]:
    """Returns dotted settings, which need not go together."""
    architecture = rng.choice(list(catalogue.ARCHITECTURES))
    objectives = catalogue.ARCHITECTURES[architecture].objectives
    objective = rng.choice([name for name in objectives if name != "supervised"])
    some = lambda *values: rng.choice(values)  # noqa: E731
    layers = rng.randint(1, 5)
    given = {
        "model.architecture": architecture,
        "data.objective": objective,
        "model.layers": layers,
        "model.hidden_size": some(32, 48),
        "model.heads": some(4, 8),
        "model.kv_heads": some(1, 2, 4, None),
        "model.head_size": some(None, None, 16),
        "model.feed_forward_size": some(48, 64),
        "model.sequence_length": some(32, 48, 64),
        "model.vocabulary_size": some(512, 500, 400),
        "model.normalization": some("rmsnorm", "layernorm"),
        "model.normalization_position": some("pre", "pre", "post"),
        "model.final_normalization": some(True, True, False),
        "model.position_encoding": some("rope", "rope", "learned", "relative", "none"),
        "model.relative_buckets": some(8, 32),
        "model.activation": some("swiglu", "geglu", "gelu", "gelu_tanh", "relu"),
        "model.bias": some(True, False),
        "model.tied_embedding": some(True, False),
        "model.embedding_normalization": some(False, False, True),
        "model.output_scale": some(None, None, 0.2),
        "model.attention_scale": some(None, None, 0.3),
        "model.segments": some(0, 0, 2),
        "model.head_transform": some(False, False, True),
        "model.output_bias": some(False, False, True),
        "model.dropout": some(0.0, 0.0, 0.1),
        "model.initializer": some(None, None, "t5x"),
        "data.document_masks": some(True, False),
        "training.seed": rng.randrange(1 << 20),
        "training.z_loss": some(0.0, 1e-3),
        "training.clip_gradient": some(0.0, 0.1, 1.0),
        "training.weight_decay": some(0.0, 0.1),
        "training.micro_batch_size": some(1, 2),
        "training.warmup": some(0.0, 2),
        "training.optimizer": some("adamw", "adamw", "sgd", "adafactor"),
    }
    if architecture == "encoder_decoder" and rng.random() < 0.5:
        given |= {
            "model.encoder_layers": rng.randint(1, 4),
            "model.decoder_layers": rng.randint(1, 4),
        }
    given["training.global_batch_size"] = some(4, 8, 12)
    if given["training.optimizer"] == "adafactor":
        given["model.bias"] = (
            False  # a key's is rounding alone, which Adafactor makes a whole step of
        )
    return given


def draw_layout(rng: random.Random) -> dict[str, Any]:
    """Returns the settings of a layout."""
    return {
        "parallel.tensor_parallel": rng.choice((1, 1, 2, 4)),
        "parallel.pipeline_parallel": rng.choice((1, 1, 2, 3, 4)),
        "parallel.context_parallel": rng.choice((1, 1, 2, 4)),
        "parallel.data_parallel_shard": rng.choice((1, 2, 3)),
        "parallel.data_parallel_replicate": rng.choice((1, 1, 2)),
        "parallel.recompute": rng.choice(("none", "selective", "full")),
        "parallel.reshard_after_forward": rng.choice((None, True, False)),
        "parallel.schedule": rng.choice(("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble")),
        "parallel.stages_per_rank": rng.choice((1, 2)),
        "training.async_save": rng.random() < 0.3,
    }


def ranks_of(raw: dict[str, Any], given: dict[str, Any]) -> int | None:
    """Returns how many processes settings take; None: no run accepts them, or too many."""
    try:
        settings = runs.settings_of(raw, None, given)
        ranks = processes(settings.parallel)
        check(settings, ranks)
    except (ConfigError, ValidationError):
        return None
    return ranks if 1 < ranks <= MOST else None


def case(raw: dict[str, Any], number: int, seed: int) -> tuple[dict[str, Any], ...]:
    """Returns the settings of a case, and of two layouts."""
    rng = random.Random(f"{seed} {number}")
    while True:
        given, layouts = draw(rng), [draw_layout(rng) for _ in range(2)]
        if all(ranks_of(raw, given | layout) for layout in layouts):
            return given, *layouts


def run(raw: dict[str, Any], given: dict[str, Any]) -> dict[str, runs.Found]:
    return runs.run(raw, [None], given, "fp64")


def go_on(raw: dict[str, Any], given: dict[str, Any], steps: int) -> tuple[list[float], dict]:
    """Takes `steps` more steps of the run in its folder, and saves; returns their losses, and the weights
    that this rank holds then."""
    torch.set_default_dtype(torch.float64)
    trainer = runs.trainer_of(runs.settings_of(raw, None, {"training.steps": 4} | given))
    begin = trainer.progress.step
    losses = [trainer.step(trainer.steps[s]).loss for s in range(begin, begin + steps)]
    trainer.save()
    return losses, runs.weights(trainer)


def play(pool: Pool, raw: dict[str, Any], given: dict, first: dict, second: dict) -> None:
    """Plays a case. AssertionError where a run differs from one process, RankError where it fails."""
    wanted = run(raw, given)[None]
    found = runs.merge(pool.run(ranks_of(raw, given | first), run, raw, given | first))[None]
    runs.compare(found, wanted, "layout", LIMIT, LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        whole, divided = ({"logging.directory": f"{folder}/{name}"} for name in ("a", "b"))
        losses, weights = pool.run(1, go_on, raw, given | whole, 4)[0]
        split, last = [], {}
        for layout in (first, second):
            settings = given | layout | divided
            answers = pool.run(ranks_of(raw, settings), go_on, raw, settings, 2)
            split += answers[0][0]
            for _, held in answers:
                last |= held
    apart = max(abs(a - b) for a, b in zip(split, losses, strict=True))
    assert apart < LIMIT, f"continued: losses {split} for {losses}"
    assert last.keys() == weights.keys()
    for name, value in weights.items():
        assert runs.distance(last[name], value) < LIMIT, f"continued: {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong, pool = 0, Pool()
    with tempfile.TemporaryDirectory() as folder:
        raw = conftest.tiny_raw(conftest.write_corpus(Path(folder)), Path(folder) / "cache")
        del raw["model"]["preset"]
        for number in range(options.first, options.first + options.cases):
            drawn, began = case(raw, number, options.seed), time.monotonic()
            try:
                play(pool, raw, *drawn)
                told = "as one process"
            except UserError as error:  # of the rows that the objective makes
                told = f"refused: {error}"
            except (AssertionError, RankError, RuntimeError) as error:
                wrong += 1
                told = f"{type(error).__name__}: {str(error).strip()[-1500:]}\n{drawn}"
            print(f"{number:4} {time.monotonic() - began:6.1f} s {told}", flush=True)
    print(f"{wrong} of {options.cases} cases differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
