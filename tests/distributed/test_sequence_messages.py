"""Tokens gathered and scattered by tensor-parallel ranks, with their gradients, as their definitions say."""

import torch
from torch.distributed.device_mesh import init_device_mesh

from megaarch.parallel.sequence_messages import Ranks, gather, scatter

RANKS, B, S, D = 3, 2, 6, 5


def drawn(seed: int, length: int) -> torch.Tensor:
    """What a rank has, which all can draw."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, length, D, generator=generator, dtype=torch.float64)


def exchanged() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns of each message what it gives this rank, and the gradient of what the rank has."""
    ranks = Ranks.of(init_device_mesh("cpu", (RANKS,)))
    found = {}
    for name, length, of_gradient, send in (
        ("summands", S // RANKS, 100 + ranks.own, lambda x: gather(x, ranks, summands=True)),
        ("whole", S // RANKS, 100, lambda x: gather(x, ranks, summands=False)),
        ("scatter", S, 100 + ranks.own, lambda x: scatter(x, ranks)),
    ):
        x = drawn(ranks.own, length).requires_grad_()
        out = send(x)
        out.backward(drawn(of_gradient, out.shape[1]))
        assert x.grad is not None
        found[name] = out.detach(), x.grad
    return found


def test_tokens_are_gathered_and_scattered_with_their_gradients(pool):
    shares, wholes = (
        [drawn(seed + rank, length) for rank in range(RANKS)]
        for seed, length in ((0, S // RANKS), (0, S))
    )
    grads, shares_of_grads = (
        [drawn(100 + rank, length) for rank in range(RANKS)] for length in (S, S // RANKS)
    )
    for rank, found in enumerate(pool.run(RANKS, exchanged)):
        wanted = {
            "summands": (torch.cat(shares, 1), sum(grads).chunk(RANKS, 1)[rank]),
            "whole": (torch.cat(shares, 1), grads[0].chunk(RANKS, 1)[rank]),
            "scatter": (sum(wholes).chunk(RANKS, 1)[rank], torch.cat(shares_of_grads, 1)),
        }
        for name, tensors in wanted.items():
            torch.testing.assert_close(found[name], tensors, rtol=1e-12, atol=1e-12, msg=name)
