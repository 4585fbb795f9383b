"""What many tests share: a small corpus, prepared once, and the settings of a tiny run."""

import copy
import gc
import json
import os
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from megaarch import config
from megaarch.config import catalogue
from megaarch.ingest.prepare import prepare

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None)  # no assertion of a test is about time
hypothesis.settings.load_profile("tests")

TESTS = Path(__file__).parent
PRESETS = tuple(catalogue.PRESETS)
WORDS = [
    "river",
    "stone",
    "light",
    "garden",
    "morning",
    "teacher",
    "letter",
    "window",
    "silver",
    "forest",
    "winter",
    "market",
    "carries",
    "finds",
    "opens",
    "writes",
    "follows",
    "keeps",
    "answers",
    "watches",
    "builds",
    "remembers",
]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: parallel workers must collect equal names, and a compressed
    file holds the second in which it was made."""
    return argname if isinstance(val, bytes) else None


# `make quick` leaves out these, and each file with `pytestmark = pytest.mark.slow`: what starts processes, servers or
# browsers, or takes long.
SLOW_FOLDERS = {
    "lm_eval",
    "slurm",
    "throughput",
    "distributed",
    "fuzz",
    "tools",
    "fake_cuda",
    "launch",
    "cluster",
}
SLOW_FIXTURES = {"pool", "started", "browser"}
# Begun first, so that no worker ends with a long file while the other one has nothing left.
LONG = ("slurm", "throughput", "distributed", "fuzz", "tools")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow tests, puts long folders first, and gives a file with a fixture of its own to one
    worker, so that the fixture is made once."""
    own = {
        item.nodeid.partition("::")[0]
        for item in items
        for found in getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009
        if found[-1].scope == "module"
    }
    for item in items:
        path = item.path.relative_to(TESTS)
        fixtures = set(getattr(item, "fixturenames", ()))
        if path.parts[0] in SLOW_FOLDERS or fixtures & SLOW_FIXTURES:
            item.add_marker(pytest.mark.slow)
        file = item.nodeid.partition("::")[0]
        if file in own and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(file))
    items.sort(key=_order)


def _order(item: pytest.Item) -> int:
    folder = item.path.relative_to(TESTS).parts[0]
    return LONG.index(folder) if folder in LONG else len(LONG)


def pytest_collection_finish() -> None:
    _freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Leaves modules, collected tests and what lasts for a session out of garbage collections: each run begins
    with one, which would look at all of them, for longer than a tiny run takes."""
    gc.collect()
    gc.freeze()


def made_up_text(seed: int, sentences: int) -> str:
    """English-like sentences in paragraphs, from a generator of its own."""
    rng = random.Random(seed)
    paragraphs = []
    for _ in range(max(1, sentences // 4)):
        lines = [
            f"The {rng.choice(WORDS[:12])} {rng.choice(WORDS[12:])} the {rng.choice(WORDS[:12])} "
            f"near number {rng.randint(1, 99)}."
            for _ in range(4)
        ]
        paragraphs.append(" ".join(lines))
    return "\n\n".join(paragraphs)


def write_corpus(folder: Path) -> Path:
    """A JSON lines file of 80 documents."""
    path = folder / "text.jsonl"
    with path.open("w") as file:
        for i in range(80):
            file.write(json.dumps({"text": made_up_text(i, 24)}) + "\n")
    return path


@pytest.fixture(scope="session", autouse=True)
def extensions(tmp_path_factory):
    """What torch compiles goes to a folder of these tests, which all their processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "extensions"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The file of write_corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def raw(corpus, tmp_path_factory):
    """A tiny configuration as a raw mapping; copy before changing it."""
    return tiny_raw(corpus, tmp_path_factory.mktemp("cache"))


def tiny_raw(corpus: Path, cache: Path) -> dict[str, Any]:
    """A tiny configuration over this corpus."""
    return {
        "model": {
            "preset": "gpt",
            "layers": 2,
            "hidden_size": 32,
            "heads": 4,
            "kv_heads": 2,
            "feed_forward_size": 48,
            "sequence_length": 48,
            "vocabulary_size": 512,
        },
        "data": {"source": str(corpus), "sentinels": 16, "cache": str(cache)},
        "training": {
            "steps": 6,
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "learning_rate": 3e-3,
            "device": "cpu",
        },
        "logging": {"tensorboard": False},
    }


@pytest.fixture
def tiny(raw, tmp_path):
    """tiny(preset, **settings) -> Settings; double underscores stand for dots."""

    def make(preset="gpt", **given):
        mine = copy.deepcopy(raw)
        mine["model"]["preset"] = preset
        mine["logging"]["directory"] = str(tmp_path / "run")
        for name, value in given.items():
            config.set_path(mine, name.replace("__", "."), value)
        return config.resolve(mine)

    return make


@pytest.fixture(scope="session")
def prepared(raw):
    """The corpus, split, with its tokenizer and its indexed tokens."""
    settings = config.resolve(copy.deepcopy(raw))
    return prepare(settings.data, settings.model.vocabulary_size)


@pytest.fixture(scope="module")
def runs(raw, prepared, tmp_path_factory):
    """runs(preset, "data.objective=prefix_lm", ...) -> the folder of a run of one step."""
    from megaarch.training.trainer import Trainer

    @lru_cache
    def run(preset, *given):
        mine = copy.deepcopy(raw)
        mine["model"]["preset"] = preset
        mine["training"]["steps"] = 1
        for text in given:
            config.set_path(mine, *config.parse_override(text))
        mine["logging"]["directory"] = str(tmp_path_factory.mktemp(preset))
        Trainer(config.resolve(mine), prepared).run()
        return mine["logging"]["directory"]

    return run
