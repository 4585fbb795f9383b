"""Shared by the kernels' tests, on the CPU and on CUDA: inputs, oracles in fp64, run functions."""

import numpy as np
import torch
import torch.nn.functional as F

from megaarch.kernels import bindings, cross_entropy
from megaarch.kernels.rms_norm import rms_norm
from megaarch.model import loss
from megaarch.model.loss import fused_slope, torch_slope

REASON = bindings.obstacle("cpu")
TOLERANCE = {  # of a norm
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
}


def draw(*shapes, dtype=torch.float64, device="cpu", seed=0):
    """Random leaves that are exact in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return [x.to(device).requires_grad_() for x in made]


def off(found, wanted):
    """The largest difference of a tensor, relative to its norm; finite throughout."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        size = b.double().norm().clamp(min=1e-30)
        worst = max(worst, float(((a.double() - b.double()).norm() / size).detach()))
    return worst


def norms(shape, dtype, device="cpu", epsilon=1e-5):
    """How far rms_norm, forward and gradients, is off torch's in fp64."""
    x, weight, grad = draw(shape, shape[-1:], shape, dtype=dtype, device=device)
    found = rms_norm(x, weight, epsilon)
    found = [found, *torch.autograd.grad(found, (x, weight), grad)]
    wide = [y.detach().double().cpu().requires_grad_() for y in (x, weight)]
    wanted = F.rms_norm(wide[0], shape[-1:], wide[1], epsilon)
    wanted = [wanted, *torch.autograd.grad(wanted, wide, grad.double().cpu())]
    assert all(y.dtype == dtype for y in found)
    return off([y.cpu() for y in found], wanted)


def losses(rows, known, columns, dtype, device="cpu", first=0, biased=True):
    """How far figures and gradient of a chunk are off torch's in fp64, for the share of a vocabulary
    that begins at id `first`; targets lie in and around it."""
    logits, bias = draw((rows, columns), (columns,), dtype=dtype, device=device)
    logits, bias = 4 * logits.detach(), bias.detach() if biased else None
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, first + known + 9, (rows,), generator=g).to(device) - first
    target[target >= known] = known if known < columns else columns + 3  # padding: nobody's target
    text = (torch.arange(columns) % 3 > 0).to(device)
    found = cross_entropy.log_sums(logits, bias, target, text, known)
    whole = logits.double() + (0 if bias is None else bias.double())
    whole[:, known:] = float("-inf")
    held = (target >= 0) & (target < known)
    at = target.clamp(0, columns - 1)[:, None]
    wanted = [whole.logsumexp(1), whole.gather(1, at)[:, 0][held]]
    wanted.append(whole.masked_fill(~text, float("-inf")).logsumexp(1))
    assert found.dtype == bindings.accumulator(dtype)
    assert (found[1][~held] == float("-inf")).all()
    worst = off([found[0], found[1][held], found[2]], wanted)

    partition = (found[0] + 0.7).contiguous()  # as if other ranks had more
    by, less = (x.detach().to(found.dtype) for x in draw((rows,), (rows,), device=device, seed=2))
    gradient = cross_entropy.gradient(logits, bias, target, partition, by, less, known)
    assert gradient.dtype == dtype and not gradient[:, known:].any()
    wanted = (whole - partition.double()[:, None]).exp() * by.double()[:, None]
    wanted.scatter_add_(1, at, torch.where(held, -less.double(), 0)[:, None])
    return max(worst / 4, off([gradient], [wanted]))


def whole_loss(rows, fused, dtype=torch.float64, half=False, device="cpu"):
    """Losses and gradients of the chunked loss in one process."""
    hidden, weight, bias, *upstream = draw(
        (rows, 16), (384, 16), (384,), (rows,), (rows,), dtype=dtype, device=device
    )
    target = torch.arange(rows, device=device) * 7 % 250
    text = torch.arange(250, device=device) % 3 > 0
    given = {"vocabulary_size": 250, "text_tokens": text, "chunk_rows": 128}
    computed = hidden.bfloat16() if half else hidden
    slope = fused_slope if fused else torch_slope
    found = loss.cross_entropy(computed, weight, bias, target, slope=slope, **given)
    gradients = torch.autograd.grad(found[:2], (hidden, weight, bias), upstream)
    return [*found, *gradients]


def strided(shape, dtype, device="cpu"):
    """[B, S, H, D] as keys are: a slice of a larger tensor."""
    b, s, h, d = shape
    (whole,) = draw((b, s, h, 3, d), dtype=dtype, device=device)
    return whole.detach()[:, :, :, 1]


def random_segments(rng: np.random.Generator, rows: int, count: int):
    """Segments of flat rows, which may overlap, as (first, lengths)."""
    first = rng.integers(0, rows, count)
    return first, np.array([rng.integers(0, rows - f + 1) for f in first])
