"""The one attention interface. Which kernel runs behind it: dispatch.py.

Letters of shapes: docs/shapes.md.
"""

import torch

from megaarch.attention import dispatch, torch_operator
from megaarch.attention.bias import RelativeBias
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
    compiled = torch.compiler.is_compiling()
    return torch_operator.attend(inputs, kernel) if compiled else dispatch.run(inputs, kernel)
