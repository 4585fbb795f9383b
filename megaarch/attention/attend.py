"""The one attention interface. Which kernel runs behind it: dispatch.py.

Letters of shapes: docs/shapes.md.
"""

import torch

from megaarch.attention import torch_operator
from megaarch.attention.bias import RelativeBias
from megaarch.attention.dispatch import KERNELS, choose_for
from megaarch.attention.kernel_interface import AttentionInputs
from megaarch.attention.mask import Parts


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parts: Parts,
    *,
    scale: float | None = None,
    bias: RelativeBias | None = None,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    kernel: str = "auto",
    fused_rows: bool = False,
) -> torch.Tensor:
    """Returns the attention of q to k and v where `parts` lets a query see a key.

    q: [B, Sq, H, Dh]; k, v: [B, Sk, Hkv, Dh] with Hkv dividing H: query head h reads key head
        h // (H / Hkv). Queries may be fewer than keys, as with a key-value cache.
    parts: on the host, for B rows, Sq queries and Sk keys.
    scale: of q·k; None is 1 / sqrt(Dh).
    bias: added to the scaled scores; needs query_positions [B, Sq, A] and key_positions
        [B, Sk, A], int64, of which axis 0 is used.
    kernel: a name in KERNELS, or "auto". fused_rows: a kernel that gathers rows does so by
        attention/fused_gather.py.

    The result is [B, Sq, H, Dh] in q's dtype. Rows in no part, and rows that see no key, are exactly
    zero and give exactly zero gradients; what padding rows of q, k and v hold reaches nothing.
    Raises ValueError for shapes that do not fit and for a kernel that is unknown or cannot run.
    Nothing waits for the device.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    inputs = AttentionInputs(
        q, k, v, parts, scale, bias, query_positions, key_positions, fused_rows
    )
    run = torch_operator.attend if torch.compiler.is_compiling() else _run
    return run(inputs, kernel)


def _run(inputs: AttentionInputs, kernel: str) -> torch.Tensor:
    check(inputs)
    name, _ = choose_for(kernel, inputs)
    return KERNELS[name].attend(inputs)


torch_operator.register(_run)


def check(inputs: AttentionInputs) -> None:
    """Raises a ValueError that names the first argument that does not fit the others."""
    q, k, v, parts, bias = inputs.q, inputs.k, inputs.v, inputs.parts, inputs.bias
    rows, queries, heads, size = q.shape
    keys, key_heads = k.shape[1:3]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (rows, size):
        raise ValueError(
            f"attend: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be "
            "[B, Sq, H, D], [B, Sk, Hkv, D] and [B, Sk, Hkv, D]"
        )
    if heads % key_heads:
        raise ValueError(f"attend: {key_heads} key heads do not divide {heads} query heads")
    if (len(parts), parts.queries, parts.keys) != (rows, queries, keys):
        raise ValueError(
            f"attend: parts are for {len(parts)} rows of {parts.queries} queries and "
            f"{parts.keys} keys, but the tensors have {rows}, {queries} and {keys}"
        )
    if bias is None:
        return
    if bias.heads != heads:
        raise ValueError(f"attend: a bias of {bias.heads} heads for {heads} query heads")
    for name, positions, length in (
        ("query_positions", inputs.query_positions, queries),
        ("key_positions", inputs.key_positions, keys),
    ):
        if positions is None or positions.shape[:2] != (rows, length):
            given = None if positions is None else list(positions.shape)
            raise ValueError(f"attend: a bias needs {name} [{rows}, {length}, A], not {given}")
