import pytest
import torch

from megaarch.model.positions import LearnedPositions, rotary_tables, rotate


def turned(x, positions, base=100.0):
    """x [B, S, H, Dh], positions [B, S, A]."""
    return rotate(x, rotary_tables(positions, x.shape[-1], base, x.dtype), positions.shape[-1])


def by_complex_numbers(x, positions, base):
    """One axis: channels i and i + Dh/2 are a complex number, turned by position·base^(-2i/Dh)."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    angle = positions[..., None, None].double() * speed
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), -1)


def test_one_axis_is_rope():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 50, (2, 5))
    expected = by_complex_numbers(x, positions, 100.0)
    torch.testing.assert_close(turned(x, positions[..., None]), expected, atol=1e-5, rtol=0)


def test_two_axes_turn_a_half_of_the_channels_each():
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    positions = torch.randint(0, 50, (2, 5, 2))
    expected = torch.cat(
        [by_complex_numbers(x[..., 8 * a : 8 * a + 8], positions[..., a], 100.0) for a in (0, 1)],
        -1,
    )
    torch.testing.assert_close(turned(x, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("axes", [1, 2])
def test_scores_see_differences_of_positions_only(axes):
    q, k = torch.randn(2, 1, 6, 2, 16, dtype=torch.float64)
    positions = torch.randint(0, 20, (1, 6, axes))

    def scores(shift):
        return torch.einsum(
            "bqhd,bkhd->bhqk", turned(q, positions + shift), turned(k, positions + shift)
        )

    shift = torch.tensor([7, 3][:axes])
    torch.testing.assert_close(scores(shift), scores(0), atol=1e-4, rtol=0)
    for axis in range(axes):  # and each axis does count
        moved = positions.clone()
        moved[:, 0, axis] += 1
        assert not torch.allclose(turned(q, moved), turned(q, positions), atol=1e-2)


@pytest.mark.parametrize("axes", [1, 2])
def test_gradient(axes):
    x = torch.randn(2, 3, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(0, 9, (2, 3, axes))
    assert torch.autograd.gradcheck(lambda x: turned(x, positions), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_gradient(dtype):
    x = torch.randn(2, 6, 3, 8).to(dtype).requires_grad_()
    positions = torch.randint(0, 50, (2, 6, 1))
    tables = rotary_tables(positions, 8, 100.0, torch.float32)

    def gradient(turn):
        return torch.autograd.grad(turn(x, tables, 1).sin().sum(), x)[0]

    torch._dynamo.reset()
    found = gradient(torch.compile(rotate, backend="aot_eager", fullgraph=True))
    assert found.any()
    torch.testing.assert_close(found, gradient(rotate))


def test_a_turn_is_rounded_once():
    """Tables stay fp32 for a bf16 input: rounded tables would turn far tokens by other angles."""
    x = torch.randn(1, 64, 2, 64).bfloat16()
    positions = torch.arange(8000, 8064).view(1, 64, 1)
    tables = rotary_tables(positions, 64, 1e4, torch.float32)
    exact = rotate(x.double(), tuple(t.double() for t in tables), 1)
    found = rotate(x, tables, 1)
    assert found.dtype == torch.bfloat16
    assert (found != exact.bfloat16()).float().mean() < 0.01  # ties of a rounding in fp32


def test_tables_are_computed_in_fp32():
    positions = torch.tensor([[[5001]]])
    cos, _ = rotary_tables(positions, 4, 1e4, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    torch.testing.assert_close(
        cos[0, 0, 0, 0].float(), torch.cos(torch.tensor(5001.0)), atol=4e-3, rtol=0
    )


def test_learned_tables_add_up_past_their_offset():
    table = LearnedPositions(rows=6, size=4, axes=2, offset=2)
    out = table(torch.tensor([[[0, 3]]]))
    assert torch.equal(out[0, 0], table[0].weight[2] + table[1].weight[5])
    assert table[0].weight.shape == (8, 4)
