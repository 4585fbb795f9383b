"""The names that `import megaarch` gives, and the page that shows them: its blocks run in order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megaarch
from megaarch.checkpoint import checkpoint
from megaarch.errors import UserError
from megaarch.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()


@pytest.fixture(scope="module")
def names(raw, tmp_path_factory):
    """What the page's blocks define. Their run goes to a folder of this test and reads its corpus."""
    folder = tmp_path_factory.mktemp("page")
    found: dict[str, object] = {}
    mine = {f"data.{name}": value for name, value in raw["data"].items()}
    mine |= {"logging.directory": folder / "run", "model.vocabulary_size": 512}
    given = "".join(f"{f'{name}={value}'!r}, " for name, value in mine.items())
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        block = block.replace('["model.preset', f'[{given}"model.preset')
        exec(compile(block, "docs/python.md", "exec"), found)
    return found


def test_the_blocks_of_the_page_run(names):
    assert names["progress"].step == 3
    assert names["out"].shape == (2, 16, 4, 32)
    assert 0 < names["mean"] < 12


def test_a_loaded_model_has_the_weights_of_the_run(names):
    trained = dict(names["trainer"].model.named_parameters())
    loaded = dict(names["model"].named_parameters())
    assert trained.keys() == loaded.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, trained[name]), name
    run = Path(names["settings"].logging.directory)
    again, settings = megaarch.load_checkpoint(checkpoint.newest(run))
    assert settings == names["settings"]
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_a_new_model_is_what_a_run_starts_from(tiny, prepared):
    settings = tiny("glm")
    model = Trainer(settings, prepared).model
    for name, parameter in megaarch.build_model(settings).named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_a_folder_without_a_sound_checkpoint_is_refused(names, tmp_path):
    with pytest.raises(UserError, match="has no complete checkpoint"):
        megaarch.load_checkpoint(tmp_path)
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        megaarch.load_checkpoint(folder)


def test_flops_of_a_row_and_of_a_batch_agree(tiny, prepared):
    settings = tiny("gpt")  # whose rows have one length
    batch = Trainer(settings, prepared).steps.batch(range(4))
    assert megaarch.count_flops(settings, batch) == 4 * megaarch.count_flops(settings)


def test_every_name_is_there_and_on_the_page():
    for name in set(megaarch.__all__) - {"__version__"}:
        assert getattr(megaarch, name).__name__ == name
        assert f"`{name}" in PAGE or f"megaarch.{name}" in PAGE
    assert set(megaarch.__all__) <= set(dir(megaarch))
    with pytest.raises(AttributeError, match="no attribute 'trainer_'"):
        megaarch.trainer_  # noqa: B018


@pytest.mark.parametrize(
    ("module", "without"), [("megaarch", "pydantic"), ("megaarch.cli.main", "torch")]
)
def test_the_import_brings_no_torch(module, without):
    """It takes seconds, and longer from a network file system: help and mistypes wait for none."""
    code = f"import sys, {module}; sys.exit(bool({{'torch', '{without}'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
