"""Generated Hugging Face folders: equal logits, or a refusal that names the key or the tensor.

`MEGAARCH_FOLDERS=2000 python -m pytest tests/interchange/test_folders.py` tries more of them.
"""

import os
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megaarch.attention import mask
from megaarch.attention.mask import Parts
from megaarch.data.batch import Batch, Counts, Stream
from megaarch.interchange import files
from megaarch.interchange.convert import Conversion, convert, settings_of
from megaarch.model import Transformer
from tests.interchange.folders import AUTO, FAMILIES, HEADED, V, draw, write

pytestmark = pytest.mark.slow

FOLDERS = int(os.environ.get("MEGAARCH_FOLDERS", 240))
GROUPS = 8
PIECES = 40
B, N, M = 2, 12, 9  # chunk_size_feed_forward has to divide N


@pytest.fixture(scope="module")
def tokenizer():
    backend = Backend(WordLevel({f"w{n}": n for n in range(PIECES)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    return backend.to_str().encode()


def tokens(n, seed):
    return torch.randint(0, PIECES, (B, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def their_logits(folder, family):
    """In fp64; None where transformers cannot run the folder, or makes up a tensor."""
    given = {"input_ids": tokens(N, 1)}
    if family in ("t5", "bart"):
        given["decoder_input_ids"] = tokens(M, 2)
    try:
        model, found = AUTO[family].from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        logits = model.eval().double()(**given).logits
    except Exception:  # of many kinds
        return None
    return None if found["missing_keys"] else logits[..., :PIECES]


def stream(ids, shape, cross=None):
    n = ids.shape[1]
    positions = torch.arange(n).expand_as(ids)[..., None]
    return Stream(ids, positions, Parts.of([[shape(0, n, 0, n)]] * B, n, n), cross)


@torch.no_grad()
def our_logits(run):
    weights, record = files.read_checkpoint(run)
    model = Transformer(settings_of(record).model).eval()
    model.load_state_dict(weights)
    shape = mask.full if model.settings.architecture == "encoder" else mask.causal
    if len(model.stacks) == 1:
        streams = (stream(tokens(N, 1), shape),)
    else:
        cross = Parts.of([[mask.full(0, M, 0, N)]] * B, M, N)
        streams = (stream(tokens(N, 1), mask.full), stream(tokens(M, 2), mask.causal, cross))
    none = torch.zeros(B, 0, dtype=torch.long)
    counts = Counts(B, (0,), (0,), (0,), 0, (0,))
    batch = Batch(streams, none, none, none.float(), none[0], 0, torch.arange(B), counts)
    return model.double().logits(batch)[..., :PIECES]


def outcome(seed, tokenizer, place: Path, out_too: bool) -> str:
    """ "equal" or "refused". AssertionError where it is neither."""
    drawn = draw(seed)
    folder, run = place / "theirs", place / "run"
    write(drawn, folder, tokenizer)
    expected = their_logits(folder, drawn.family)
    where = f"folder {seed} ({drawn.family}: {', '.join(drawn.told)})"
    job = Conversion(folder, run, "checkpoint", sentinels=2, verify=False)
    try:
        convert(job)
    except ValueError as error:
        assert drawn.blame, f"{where} was refused: {error}"
        assert any(name in str(error) for name in drawn.blame), f"{where}, {drawn.blame}: {error}"
        assert not run.exists()
        return "refused"
    assert expected is not None, f"{where} was taken, and transformers has no such model"
    found, largest = our_logits(run), expected.abs().max()
    within = 2e-4 if drawn.family in ("llama", "t5") else 1e-9  # the two have parts in fp32
    difference = (found - expected).abs().max() / largest
    assert difference < within, f"{where}: {difference}"
    if out_too:
        convert(Conversion(run, place / "back", "hf", verify=True))
    return "equal"


@pytest.mark.parametrize("group", range(GROUPS))
def test_equal_logits_or_a_refusal_that_names_the_key(group, tokenizer, tmp_path):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = []
    for seed in range(group, FOLDERS, GROUPS):
        (tmp_path / str(seed)).mkdir()
        found.append(outcome(seed, tokenizer, tmp_path / str(seed), out_too=seed % 24 == group))
    assert found.count("equal") > len(found) / 4  # not everything is refused
    assert "refused" in found


def test_all_families_and_both_outcomes_are_drawn():
    drawn = [draw(seed) for seed in range(60)]
    assert {d.family for d in drawn} == set(FAMILIES) == set(HEADED)
    clean = [not d.blame for d in drawn]
    assert 15 < sum(clean) < 50 and all(
        len(d.tensors) > 8 and d.config["vocab_size"] == V for d in drawn
    )
