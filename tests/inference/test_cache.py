"""Logits over a cache equal those of one forward pass without it, for every preset that generates."""

import numpy as np
import pytest
import torch

from megaarch.attention import Parts, attend, full
from megaarch.errors import UserError
from megaarch.inference.prompts import prompt
from megaarch.model import flops
from tests.data.toy_vocabulary import TEXT
from tests.inference.models import CHUNKED, GENERATING, LENGTHS, VOCABULARY, made, started
from tests.inference.oracle import next_logits

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
STEPS = 5


def check(model, settings, limit, chunk=None):
    """Compares every step's logits, two rows leaving the batch on the way."""
    decoding, prefixes = started(model, settings, chunk)
    rng = np.random.default_rng(1)
    answers = [np.empty(0, dtype=np.int64) for _ in prefixes]
    with torch.no_grad():
        logits = decoding.start()
        for step in range(STEPS + 1):
            for row, (prefix, answer) in enumerate(zip(prefixes, answers, strict=True)):
                wanted = next_logits(model, settings, VOCABULARY, prefix, answer)
                assert wanted.std() > 0.1
                torch.testing.assert_close(logits[row], wanted, rtol=limit, atol=limit)
            if step == 2:
                decoding.select([3, 0])
                prefixes, answers = ([x[3], x[0]] for x in (prefixes, answers))
            tokens = rng.integers(TEXT, size=len(prefixes))
            answers = [np.append(a, t) for a, t in zip(answers, tokens, strict=True)]
            logits = decoding.step(tokens)


@pytest.mark.parametrize("preset", GENERATING)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_cached_logits_equal_uncached_ones(preset, dtype):
    check(*made(preset, dtype), LIMITS[dtype])


@pytest.mark.parametrize("preset", CHUNKED)
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_any_split_of_a_causal_prompt_gives_the_same(preset, chunk):
    check(*made(preset), 1e-10, chunk)


@pytest.mark.parametrize("kernel", ["cpu", "sdpa", "reference"])
@pytest.mark.parametrize("preset", ["gpt", "t5", "unilm", "xlnet"])
def test_every_kernel_reads_the_cache(preset, kernel):
    check(*made(preset, torch.float32, attention=kernel), 1e-5)


@pytest.mark.parametrize("encoding", ["relative", "learned", "none"])
@pytest.mark.parametrize("preset", ["gpt", "prefix_lm", "t5", "bart", "unilm", "xlnet"])
def test_every_kind_of_position(preset, encoding):
    check(*made(preset, position_encoding=encoding), 1e-10)


def test_one_query_of_each_row_over_strided_keys():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 1, 4, 8, generator=generator)
    k, v = torch.randn(2, 3, 40, 2, 8, generator=generator)[:, :, :29]
    parts = Parts.of([[full(0, 1, 0, 29)]] * 3, 1, 29)
    with torch.no_grad():
        found, wanted = (attend(q, k, v, parts, kernel=name) for name in ("cpu", "reference"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_relative_positions_in_the_cpu_kernel():
    check(*made("t5", torch.float32, position_encoding="relative", attention="cpu"), 1e-5)


def test_learned_positions_of_two_axes():
    check(*made("glm", position_encoding="learned"), 1e-10)


def test_a_bidirectional_prefix_cannot_be_cut():
    decoding, _ = started(*made("prefix_lm"), chunk=3)
    with pytest.raises(UserError, match=r"tokens 0 to 5 see each other"):
        decoding.start()


def test_bert_is_refused():
    with pytest.raises(UserError, match="no left-to-right conditional"):
        prompt("masked_lm", "encoder", np.arange(4), VOCABULARY)


def test_the_cache_grows_by_doubling_and_counts_its_bytes():
    model, settings = made("gpt", torch.float32)
    decoding, _ = started(model, settings)
    with torch.no_grad():
        decoding.start()
        sizes = [decoding.cache.nbytes]
        for _ in range(20):
            decoding.step(np.zeros(len(LENGTHS), dtype=np.int64))
            sizes.append(decoding.cache.nbytes)
    slots = 14 + 1  # the longest prompt, its start token and room for none
    layers, key_heads, size = 2, 2, 8
    of_slot = len(LENGTHS) * (layers * 2 * key_heads * size * 4 + 8)  # fp32, and a position
    assert sizes == [of_slot * slots * (1 if n < 2 else 2 if n < 17 else 4) for n in range(21)]


@pytest.mark.parametrize("preset", GENERATING)
def test_counts_are_those_of_the_work(preset):
    """The products of a step by a model's weights, as torch counts them; it counts no attention on CPUs."""
    from torch.utils.flop_counter import FlopCounterMode

    model, settings = made(preset, attention="sdpa")
    decoding, _ = started(model, settings)
    with torch.no_grad():
        decoding.start()
        decoding.select([0])
        decoding.counts, counter = None, FlopCounterMode(display=False)
        with counter:
            decoding.step(np.array([7]))
    assert decoding.counts is not None
    ours = flops.forward(settings.model, decoding.counts)
    padding = -VOCABULARY.size % 128
    head = 2 * settings.model.hidden_size * padding
    assert counter.get_total_flops() == ours.total - ours.attention + head
