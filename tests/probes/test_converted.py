"""Probes of models that were converted from Hugging Face: their attention is transformers' own."""

import math

import numpy as np
import pytest
import torch
import transformers

from megaarch.probes import catalogue
from megaarch.probes.attention_weights import recorded_attention
from megaarch.probes.probed_model import open_subject
from tests.lm_eval.local import FAMILIES, write_pair

ROWS, LENGTH, PREFIX = 3, 24, 12


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return write_pair(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents, of which some are held out."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("river", "stone", "garden", "letter", "window", "forest", "market", "winter")
    rng = np.random.default_rng(0)
    documents = (" ".join(rng.choice(words, 60)) for _ in range(40))
    file.write_text("\n<|endoftext|>\n".join(documents))
    return file


@pytest.fixture
def given(text, tmp_path):
    return [f"data.source={text}", "data.held_out=0.4", f"data.cache={tmp_path}"]


def theirs(folder, streams):
    """Attention of transformers' model in fp64, [(encoder,) decoder, (cross)], each [L, B, H, n, m]."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").double()
    named = {"input_ids": streams[0]}
    if len(streams) > 1:
        named["decoder_input_ids"] = streams[1]
    with torch.no_grad():
        found = model.eval()(**named, output_attentions=True)
    if len(streams) == 1:
        return [torch.stack(found.attentions)]
    kinds = (found.encoder_attentions, found.decoder_attentions, found.cross_attentions)
    return [torch.stack(kind) for kind in kinds]


def test_attention_of_a_converted_model_is_transformers_own(pair, given):
    folder, run = pair
    subject = open_subject(run, given)
    batch = subject.batch(subject.rows(LENGTH, ROWS).tokens, PREFIX)
    for stream in batch.streams:  # marks of our forms, of which theirs has no embedding
        stream.tokens.clamp_(max=transformers.AutoConfig.from_pretrained(folder).vocab_size - 1)
    with torch.no_grad(), recorded_attention(subject.model) as weights:
        subject.model.run(batch)
    streams = [stream.tokens for stream in batch.streams]
    used = [torch.from_numpy(stream.parts.dense().any(-1)) for stream in batch.streams]
    modules = list(subject.model.layers.values())
    layers = [weights[layer.attention] for layer in modules]
    depth = len(layers) // len(streams)
    ours = [torch.stack(layers[s * depth : (s + 1) * depth]) for s in range(len(streams))]
    if crossed := [layer.cross_attention for layer in modules if layer.cross_attention]:
        ours.append(torch.stack([weights[module] for module in crossed]))
        used.append(used[-1])
    for mine, wanted, queries in zip(ours, theirs(folder, streams), used, strict=True):
        assert queries.sum() >= ROWS * PREFIX
        rows = queries[None, :, None].expand(mine.shape[:-1])  # padding sees nothing
        # transformers has softmax and RMSNorm in fp32
        torch.testing.assert_close(mine[rows], wanted[rows], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("probe", ["rank", "position", "difficulty", "dialogue"])
def test_every_probe_measures_a_converted_model(probe, pair, given):
    _, run = pair
    found = catalogue.run(probe, [run], catalogue.Options(rows=8, length=LENGTH), given)
    [record] = found.cells.values()
    numbers = list(leaves(record.model_dump()))
    assert numbers and all(map(math.isfinite, numbers))


def leaves(found):
    """The numbers of a record."""
    if isinstance(found, dict | list | tuple):
        for each in found.values() if isinstance(found, dict) else found:
            yield from leaves(each)
    elif isinstance(found, int | float):
        yield found
