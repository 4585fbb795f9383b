import numpy as np
import pytest
import torch
from torch import nn

from megaarch.attention.mask import Parts, causal, full
from megaarch.probes import attention_rank, matrix_rank
from megaarch.probes.catalogue import Options
from megaarch.probes.hidden_states import states_by_stack
from tests.conftest import PRESETS

OPTIONS = Options(rows=3, length=20)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_probe_of_each_preset(preset, subject):
    """All blocks that the preset's mask has, finite, with ranks between 0 and 1."""
    found = attention_rank.measure(subject(preset), OPTIONS)
    blocks = {"bert": {"encoder"}, "prefix_lm": {"decoder", "decoder.prefix", "decoder.rest"}}
    for name in ("gpt", "unilm", "glm", "xlnet"):
        blocks[name] = blocks["prefix_lm"]
    assert found.blocks.keys() == blocks.get(preset, {"encoder", "decoder", "decoder.cross"})
    for name, block in found.blocks.items():
        assert (len(block.layers), [len(heads) for heads in block.heads]) == (2, [4, 4])
        mean = np.mean([[h.matrix.effective_rank.value for h in heads] for heads in block.heads])
        assert block.trained.matrix.effective_rank.value == pytest.approx(mean)
        for attention in (block.trained, *block.masks.values(), *block.random.values()):
            spectrum = attention.matrix
            shares = [*spectrum.numerical_rank.values(), spectrum.stable_rank]
            assert all(0 < e.value <= 1 + 1e-9 for e in (*shares, spectrum.effective_rank))
        assert (block.lost_by_seeing_ahead is None) == ("." in name)
    for stream in found.residual.values():
        assert stream.keys() == attention_rank.SWITCHES.keys()
        assert len(stream["whole"]["frobenius"]) == 3
        assert all(np.isfinite(e.value) for norms in stream.values() for e in norms["composite"])


@pytest.mark.parametrize(("preset", "own"), [("gpt", "causal"), ("bert", "full")])
def test_the_own_mask_is_one_of_the_two(preset, own, subject):
    block = next(iter(attention_rank.measure(subject(preset), OPTIONS).blocks.values()))
    other = {"causal": "full", "full": "causal"}[own]
    assert block.masks[own] == block.trained
    assert block.masks[other] != block.trained
    ranks = {mask: block.masks[mask].matrix.effective_rank.value for mask in block.masks}
    assert block.lost_by_seeing_ahead.value == pytest.approx(ranks["causal"] - ranks["full"])
    for matched in block.matched.values():
        assert matched.entropy.value == pytest.approx(block.trained.entropy.value, abs=1e-4)


def test_the_square_blocks_of_a_prefix():
    """Those of a mask that is drawn by hand: R[0:2; 0:2] + C[2:5; 0:5], and one padding slot."""
    parts = Parts.of([[full(0, 2, 0, 2), causal(2, 5, 0, 5)]], 6, 6)
    assert attention_rank.prefix_length(parts, 0, 5) == 2
    assert attention_rank.prefix_length(Parts.of([[full(0, 5, 0, 5)]], 6, 6), 0, 5) == 0
    assert (
        attention_rank.prefix_length(Parts.of([[causal(0, 5, 0, 5)]], 6, 6), 0, 5) == 2
    )  # the first half


def test_blocks_are_cut_from_the_whole_matrix(subject):
    subject = subject("prefix_lm")
    batch = subject.batch(subject.rows(20, 2).tokens, 8)
    found = attention_rank.blocks(subject.model, batch)
    whole, prefix, rest = (found[name][0] for name in ("decoder", "decoder.prefix", "decoder.rest"))
    assert (whole.shape, prefix.shape) == ((2, 4, 20, 20), (2, 4, 9, 9))  # with the start token
    assert (prefix > 0).all()
    torch.testing.assert_close(prefix, whole[..., :9, :9])
    assert (rest.triu(1) == 0).all()
    torch.testing.assert_close(rest.sum(-1), torch.ones(2, 4, 11, dtype=torch.float64))
    torch.testing.assert_close(
        rest[..., 3, 2] / rest[..., 3, 0], whole[..., 12, 11] / whole[..., 12, 9]
    )


def test_content_alone_counts_in_two_streams(subject):
    subject = subject("xlnet")
    batch = subject.batch(subject.rows(20, 2).tokens, 12)
    found = attention_rank.blocks(subject.model, batch)
    assert found["decoder"][0].shape[-2:] == (20, 20)
    assert batch.streams[0].tokens.shape[1] == 28  # eight queries


def attention_alone(subject, deviation: float):
    """A bidirectional model of two layers without norms, and rows of text."""
    subject = subject(
        "bert", model__position_encoding="none", model__layers=2, model__initial_deviation=deviation
    )
    model = subject.model
    for name, _ in list(model.named_modules()):
        if name.startswith("layers.") and name.endswith("_norm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
    return model, subject.batch(subject.rows(20, 3).tokens, 10)


def test_attention_alone_collapses_as_fast_as_the_bound(subject):
    """Dong et al. 2021, theorem 2.2, layer by layer: in the composite norm of 1 and infinity the residual
    behind a layer is at most 4 sum_h ||W_QK,h||_1 ||W_h||_{1,inf} / sqrt(d) times the cube of the one before,
    where scores are small."""
    model, batch = attention_alone(subject, 0.045)
    residuals = of_depth(model, batch)
    for depth in range(2):
        bound = factor(model.layers[str(depth)].attention) * residuals[depth] ** 3
        assert (bound < residuals[depth]).all(), "weights for which the bound says something"
        assert (residuals[depth + 1] <= bound).all()


def test_half_the_residual_is_a_512th_of_it_behind_two_layers(subject):
    """The rate of that bound, 3^L, at weights for which rounding is far."""
    model, batch = attention_alone(subject, 0.3)
    model.embedding.weight.mul_(0.5)
    whole = of_depth(model, batch)
    model.embedding.weight.mul_(0.5)
    half = of_depth(model, batch)
    for depth in range(3):
        assert (torch.log2(whole[depth] / half[depth]) > 3**depth - 0.5).all()


def of_depth(model, batch) -> list[torch.Tensor]:
    """Residuals [B] of the embedding and behind each layer of attention alone."""
    [layers] = states_by_stack(model, batch, skip=False, feed_forward=False)
    return [matrix_rank.composite_norm(matrix_rank.without_mean_row(x)) for x in layers]


def factor(attention) -> float:
    """4 sum_h ||W_Q W_K'||_1 ||W_V W_O||_{1,inf} / sqrt(d), from the layer's fused weights."""
    size, group = attention.head_size, attention.group
    total = 0.0
    for pair, rows in enumerate(attention.qkv.weight.split((group + 2) * size)):
        *queries, key, value = rows.split(size)
        for i, query in enumerate(queries):
            head = (pair * group + i) * size
            out = attention.output.weight[:, head : head + size]
            both = (query.T @ key).abs().sum(0).max()
            total += float(both * matrix_rank.composite_norm(value.T @ out.T))
    return 4 * total / size**0.5


def test_more_rows_than_a_pass_keep_their_documents(subject):
    """Rows of several passes are put together in order: a row's measures are the same in any pass."""
    subject = subject("gpt")
    few = attention_rank.measure(subject, Options(rows=attention_rank.BATCH, length=12))
    many = attention_rank.measure(subject, Options(rows=attention_rank.BATCH + 3, length=12))
    assert few.blocks["decoder"].trained.entropy.items == attention_rank.BATCH
    assert many.blocks["decoder"].trained.entropy.items == attention_rank.BATCH + 3
    assert many.blocks["decoder"].random == few.blocks["decoder"].random


def test_attention_to_all_alike_is_the_control_of_a_mask_s_shape(subject):
    block = attention_rank.measure(subject("prefix_lm"), OPTIONS).blocks["decoder.prefix"]
    n = block.queries
    triangle = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    values = np.linalg.svd(triangle, compute_uv=False)
    share = values / values.sum()
    causal, whole = (block.uniform[mask] for mask in ("causal", "full"))
    wanted = np.exp(-(share * np.log(share)).sum()) / n
    assert causal.matrix.effective_rank.value == pytest.approx(wanted)
    assert whole.matrix.effective_rank.value == pytest.approx(1 / n)
    assert causal.entropy.value == pytest.approx(1) == whole.entropy.value


def test_a_matrix_with_a_row_that_has_no_weights_counts_nowhere():
    """A query that looks at its prefix alone, to the last bit, has a row of 0 / 0 in the rest."""
    matrices = torch.rand(2, 3, 8, 8, dtype=torch.float64).softmax(-1)
    whole = attention_rank.measured(matrices)
    matrices[1, 2, 5] = torch.nan
    found = attention_rank.measured(matrices)
    assert found.keys() == whole.keys()
    for name, values in found.items():
        assert np.isnan(values[1, 2]) and np.isfinite(np.delete(values.ravel(), 5)).all(), name
        np.testing.assert_array_equal(
            np.delete(values.ravel(), 5), np.delete(whole[name].ravel(), 5)
        )
    row = {name: values[None] for name, values in found.items()}
    value = attention_rank.estimated(row, np.zeros(1)).matrix.effective_rank.value
    assert value == pytest.approx(np.nanmean(found["matrix", "effective_rank"]))
