"""The projections that one parameter holds fused: which of its rows belong to which. A recipe that treats
projections apart (initial values, Adafactor's factors) asks here."""

from dataclasses import dataclass

import torch

from megaarch.config import schema
from megaarch.config.matmuls import head_size, key_heads


@dataclass(frozen=True)
class Fused:
    """The layout of a parameter's rows.

    names: of the projections. pattern: the projection of each block of `block` rows; it repeats down the
    rows.
    """

    names: tuple[str, ...]
    pattern: tuple[int, ...] = (0,)
    block: int = 1

    def of_rows(self, rows: range) -> torch.Tensor:
        """Returns the index in `names` of the projection of each row, int64 [len(rows)]."""
        blocks = torch.arange(rows.start, rows.stop) // self.block % len(self.pattern)
        return torch.tensor(self.pattern)[blocks]

    def sizes(self, rows: int) -> list[int]:
        """Returns how many of a parameter's `rows` each projection has."""
        each = rows // len(self.pattern)
        return [each * self.pattern.count(index) for index in range(len(self.names))]


def projections(name: str, model: schema.Model) -> Fused:
    """Returns the layout of the parameter of this global name (layers.py says how rows lie)."""
    module = name.rpartition(".")[0]
    if module.endswith("attention.qkv"):
        group = model.heads // key_heads(model)
        return Fused(("query", "key", "value"), (0,) * group + (1, 2), head_size(model))
    if module.endswith("cross_attention.kv"):
        return Fused(("key", "value"), (0, 1), head_size(model))
    if module.endswith("feed_forward.gate_up"):
        return Fused(("gate", "up"), (0, 1))
    return Fused(("query" if module.endswith("cross_attention.q") else name,))
