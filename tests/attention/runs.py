"""What tests of attention share: random inputs, a kernel's output and gradients, and their comparison."""

import torch

from megaarch.attention import RelativeBias, attend


def tensors(parts, heads=4, key_heads=2, size=8, dtype=torch.float64, seed=0):
    """q, k, v and the gradient of the output."""
    rng = torch.Generator().manual_seed(seed)
    rows, queries, keys = len(parts), parts.queries, parts.keys
    shapes = [(rows, queries, heads, size), *[(rows, keys, key_heads, size)] * 2]
    q, k, v = (torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v, torch.randn(shapes[0], generator=rng, dtype=torch.float64).to(dtype)


def run(kernel, parts, q, k, v, grad, table=None, positions=(None, None), **options):
    """[out, dq, dk, dv] and the gradient of the bias table where there is one."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if table is not None:
        leaves.append(table.clone().requires_grad_())
        options["bias"] = RelativeBias(leaves[3], bidirectional=True, max_distance=12)
        options["query_positions"], options["key_positions"] = positions
    out = attend(*leaves[:3], parts, kernel=kernel, **options)
    assert out.shape == q.shape and out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def unread(parts):
    """bool [B, Sq] and [B, Sk]: queries that see no key, keys that no query sees."""
    seen = torch.from_numpy(parts.dense())
    return ~seen.any(2), ~seen.any(1)


def assert_same(kernel, parts, *arguments, tolerance=1e-12, **options):
    """Against the reference on the same inputs."""
    expected, found = (run(n, parts, *arguments, **options) for n in ("reference", kernel))
    for name, a, b in zip(("out", "dq", "dk", "dv"), expected, found):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=f"{name} differs")
