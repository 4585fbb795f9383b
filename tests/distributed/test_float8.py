"""Float8 products, emulated, in layouts: the figures of one process, and a common checkpoint."""

import shutil

import pytest

from megaarch.checkpoint import storage
from tests.distributed import runs
from tests.distributed.layouts import CP2, FSDP2, LAYOUTS, TP2

RECIPES = ("tensorwise", "rowwise")
GIVEN = {
    "model.feed_forward_size": 64,  # of which each of two ranks has a multiple of 16
    "training.precision": "bf16",
    "training.float8_emulate": True,
    "training.global_batch_size": 4,
    "training.steps": 6,
}
GRADIENTS = {"tp2": 2**-3, "fsdp2": 1e-2}


@pytest.fixture(scope="module")
def single(raw, prepared):
    """By recipe, one process."""
    presets = ["gpt", "t5"]
    return {name: runs.run(raw, presets, GIVEN | {"training.float8": name}) for name in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["tp2", "fsdp2"])
def test_layouts_follow_one_process(name, recipe, pool, raw, single):
    """Losses within 2e-3 over 6 steps, as in bf16; the first step's gradients within bf16's rounding
    where ranks multiply what one process does, else within float8's."""
    ranks, given, _ = LAYOUTS[name]
    settings = GIVEN | given | {"training.float8": recipe}
    found = runs.merge(pool.run(ranks, runs.run, raw, ["gpt", "t5"], settings))
    for preset in ("gpt", "t5"):
        wanted = single[recipe][preset]
        apart = [abs(a / b - 1) for a, b in zip(found[preset].losses, wanted.losses, strict=True)]
        assert max(apart) < 2e-3, preset
        largest, where = runs.differences(found[preset], wanted)
        assert largest.gradient < GRADIENTS[name], (preset, where["gradient"])


def gathered(raw, given):
    """What a layer multiplies, and what the optimizer holds."""
    trainer = runs.trainer_of(runs.settings_of(raw, "gpt", given))
    kinds = set()
    layer = trainer.model.layers["0"]
    layer.attention.register_forward_pre_hook(
        lambda module, _: kinds.add(type(module.qkv.weight.data).__name__)
    )
    trainer.step(trainer.steps[0])
    return kinds, {str(p.dtype) for p in trainer.model.parameters()}


@pytest.mark.parametrize(
    ("recipe", "kind"), [("tensorwise", "Float8TrainingTensor"), ("rowwise", "Tensor")]
)
def test_fsdp_gathers_tensorwise_weights_in_float8(recipe, kind, pool, raw, prepared):
    given = GIVEN | FSDP2 | {"training.float8": recipe}
    for kinds, masters in pool.run(2, gathered, raw, given):
        assert kinds == {kind} and masters == {"torch.float32"}


def run_on(raw, given, steps):
    """Continues a run to so many steps; returns the losses of those and the last weights."""
    settings = runs.settings_of(raw, "gpt", given | {"training.steps": steps})
    trainer = runs.trainer_of(settings)
    losses = []
    trainer.watch = lambda step: losses.append(step.loss)
    trainer.run()
    return losses, runs.weights(trainer)


@pytest.mark.parametrize("other", [{}, TP2 | FSDP2, CP2], ids=["one process", "tp2 x fsdp2", "cp2"])
def test_a_sharded_run_goes_on_in_another_layout(other, pool, raw, prepared, tmp_path):
    """Its checkpoint holds plain tensors, whatever FSDP gathers."""
    ours, theirs = ({"logging.directory": str(tmp_path / name)} for name in ("ours", "theirs"))
    given = GIVEN | {"training.float8": "tensorwise", "training.schedule": "constant"}
    ((_, saved), _) = pool.run(2, run_on, raw, given | ours | FSDP2, 2)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    (folder,) = (tmp_path / "ours").glob("checkpoints/*2/state")
    assert not any(b"torchao" in file.read_bytes() for file in folder.iterdir())
    stored = storage.read_whole(folder, "model.")
    assert stored.keys() == saved.keys()
    assert all((stored[name] == value).all() for name, value in saved.items())
    wanted, _ = pool.run(2, run_on, raw, given | ours | FSDP2, 4)[0]
    given = given | theirs | other
    ranks = 4 if other == TP2 | FSDP2 else 2
    found, _ = pool.run(ranks, run_on, raw, given, 4)[0] if other else run_on(raw, given, 4)
    assert len(found) == len(wanted) == 2
    assert max(abs(a / b - 1) for a, b in zip(found, wanted)) < 2e-3
