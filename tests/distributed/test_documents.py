"""With document masks the loss of packed documents is that of each document alone in a row, in every
preset and layout."""

import json
from functools import lru_cache

import pytest

from megaarch.data.packing import pack
from tests.conftest import PRESETS, made_up_text
from tests.distributed import runs
from tests.distributed.layouts import CP2, DEEPER, FSDP2, PP2, TP2
from tests.steps import forward_backward

GIVEN = DEEPER | {"data.document_masks": True, "training.global_batch_size": 8, "training.steps": 1}


@pytest.fixture(scope="module")
def short(raw, tmp_path_factory):
    """The tiny configuration over documents of 20 to 220 characters."""
    folder = tmp_path_factory.mktemp("short")
    texts = [made_up_text(i, 24)[: 20 + 7 * i % 200] for i in range(250)]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return raw | {"data": raw["data"] | {"source": str(path), "cache": str(folder)}}


@pytest.fixture(scope="module")
def alone(short):
    """alone(preset): the loss of the first step, of rows that hold one example each."""

    @lru_cache
    def loss(preset):
        trainer = runs.trainer_of(runs.settings_of(short, preset, GIVEN))
        rows = trainer.rows
        examples = [[example] for i in range(8) for example in rows[i]]
        assert len(examples) > 10
        batches = [
            pack([e], rows.shape, pad=rows.vocabulary.pad, axes=rows.axes, sample_index=[0])
            for e in examples
        ]
        return forward_backward(trainer, batches).item()

    return loss


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_documents_cost_what_each_costs_alone(preset, short, alone):
    found = runs.run(short, [preset], GIVEN)[preset]
    assert found.losses[0] == pytest.approx(alone(preset), abs=1e-6)


@pytest.mark.parametrize("layout", (TP2, PP2, CP2), ids=("tp2", "pp2", "cp2"))
def test_they_do_in_every_layout(layout, short, pool, alone):
    found = runs.merge(pool.run(2, runs.run, short, list(PRESETS), GIVEN | layout))
    for preset in PRESETS:
        assert found[preset].losses[0] == pytest.approx(alone(preset), abs=1e-6), preset


@pytest.mark.parametrize("tokens", (230, 60))
@pytest.mark.parametrize("layout", (TP2, PP2, CP2, FSDP2), ids=("tp2", "pp2", "cp2", "fsdp2"))
def test_batches_in_tokens_are_one_in_every_layout(layout, tokens, short, pool):
    """Micro-batches with empty rows among them; of 60 tokens, whole ones that are empty."""
    batch = {"training.global_batch_tokens": tokens, "training.steps": 3}
    given = DEEPER | {"data.document_masks": True} | batch
    presets = ["gpt", "t5", "xlnet"]
    found = runs.merge(pool.run(2, runs.run, short, presets, given | layout))
    for preset, wanted in runs.run(short, presets, given).items():
        found[preset].counts = (*found[preset].counts[:-1], wanted.counts[-1])  # slots may be more
        runs.compare(found[preset], wanted, preset, 1e-5)
