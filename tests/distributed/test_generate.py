"""Generation under tensor and sharded data parallelism equals that of one process."""

import copy
import warnings

import pytest
import torch

from megaarch import config
from megaarch.config import catalogue
from megaarch.distributed.mesh import Grid
from megaarch.inference.decode import Decoding, Layout
from megaarch.inference.prompts import prompt
from megaarch.parallel.parallelize import build
from tests.distributed.layouts import FSDP2, TP2

TEXTS = ("The river finds", "The stone", "Winter opens the garden near number 7")
STEPS = 6


def greedy(raws, layout, tokenizer):
    """Tokens and logits of each raw configuration's untrained model, under a layout."""
    found = {}
    for name, raw in raws.items():
        raw = copy.deepcopy(raw)
        for path, value in layout.items():
            config.set_path(raw, path, value)
        settings = config.resolve(raw)
        grid = Grid.build(settings.parallel, "cpu")
        model = build(settings, grid).eval()
        data, vocabulary = settings.data, tokenizer.vocabulary
        architecture = settings.model.architecture
        prompts = [
            prompt(data.objective, architecture, tokenizer.encode(t), vocabulary) for t in TEXTS
        ]
        axes = catalogue.position_axes(data.objective)
        layout_of = Layout(grid.device, axes, vocabulary.pad, grid.row_multiple)
        decoding, steps = Decoding(model, layout_of, prompts), []
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", FutureWarning)  # a user of torch 2.13 would see it
            steps.append(decoding.start())
            for _ in range(STEPS):
                steps.append(decoding.step(steps[-1].argmax(-1).numpy()))
        found[name] = torch.stack(steps), decoding.cache.nbytes
    return found


@pytest.mark.parametrize("layout", [TP2, FSDP2], ids=["tp2", "fsdp2"])
def test_every_rank_finds_the_logits_of_one_process(layout, pool, raw, prepared):
    raws = {}
    for preset in ("gpt", "prefix_lm", "t5", "bart", "unilm", "glm", "xlnet", "ul2"):
        raws[preset] = copy.deepcopy(raw)
        raws[preset]["model"]["preset"] = preset
    raws["relative"] = copy.deepcopy(raws["t5"])
    raws["relative"]["model"]["position_encoding"] = "relative"
    alone = greedy(raws, {}, prepared.tokenizer)
    for rank in pool.run(2, greedy, raws, layout, prepared.tokenizer):
        for name, (logits, nbytes) in rank.items():
            wanted, whole = alone[name]
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
            assert nbytes < 0.8 * whole if layout is TP2 else nbytes == whole
