"""What stacks of software do differently, and the memory traffic of their elementwise kernels.

Bytes are of bf16 tensors that a kernel reads and writes, for one element of its operand. `EAGER` is a
kernel an operator; `COMPILED` is what torch.compile fuses, and what Megatron-LM's own fused kernels
come to; `COMPOSITE` is eager torch of 2024, whose RMSNorm is nine operators in fp32 and whose Llama
turns queries and keys as complex fp32 numbers.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from megaarch.config.schema import Settings
from megaarch.parallel import compile, tensor_linear


@dataclass(frozen=True)
class Bytes:
    """In the forward and the backward pass; of a kernel, for one element."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: float) -> "Bytes":
        return Bytes(self.forward * count, self.backward * count)


@dataclass(frozen=True)
class Traffic:
    """Bytes that elementwise kernels move, for one element of: the width (norm, residual), the
    feed-forward (gate: activation and product with its gate; activation: where there is none), queries
    and keys (rope), a logit. launches: kernels of a layer besides its products and attention."""

    norm: Bytes
    residual: Bytes
    gate: Bytes
    activation: Bytes
    rope: Bytes
    logit: Bytes
    launches: Bytes


EAGER = Traffic(
    norm=Bytes(4, 6),
    residual=Bytes(6, 6),
    gate=Bytes(10, 18),
    activation=Bytes(4, 6),
    rope=Bytes(14, 14),
    logit=Bytes(12, 24),
    launches=Bytes(20, 40),
)
COMPILED = Traffic(
    norm=Bytes(2, 8),
    residual=Bytes(6, 0),
    gate=Bytes(6, 10),
    activation=Bytes(4, 6),
    rope=Bytes(4, 4),
    logit=Bytes(4, 6),
    launches=Bytes(6, 12),
)
COMPOSITE = Traffic(
    norm=Bytes(36, 76),
    residual=Bytes(6, 6),
    gate=Bytes(10, 18),
    activation=Bytes(4, 6),
    rope=Bytes(20, 20),
    logit=Bytes(18, 24),
    launches=Bytes(50, 100),
)
TRAFFIC = {"eager": EAGER, "compiled": COMPILED, "composite": COMPOSITE}


@dataclass(frozen=True)
class Software:
    """What differs between stacks of software. The defaults are this one, not compiled.

    traffic: of elementwise kernels.
    sequence_parallel: tensor ranks share the tokens between products (Korthikanti et al. 2022).
    attention: the kernel, attention_share: how much of that kernel's rate it reaches; with `scores`
        every score is in memory.
    logits_again: the head's backward pass computes those logits again that the loss has no room to keep.
    products_again: share of a layer's products that `selective` recomputation makes again.
    early_stop: full recomputation leaves out a layer's last product, whose output nothing needs.
    float8: the recipe of layers' products. float8_gathers: data ranks gather parameters in float8,
    float8_messages: tensor ranks gather tokens in it.
    overlaps_gradients: a column-wise layer scatters its input's gradient beside the product of its weight's;
    regathers_tokens: and gathers its tokens once more, beside the product of its input's.
    shares_memory: tensor ranks gather the encoder's output once for all decoder layers of a stage.
    overlaps_tensor: tensor-parallel messages run beside pieces of their products.
    overlaps_pipeline: messages between stages run beside a stage's work.
    ring_context: context ranks pass keys and values on beside attention, instead of an all-to-all.
    keeps_parameters: data ranks gather once a step (Megatron-LM's distributed optimizer).
    node_rings: a group that spans nodes uses the network port of each of its GPUs.
    gradient_bytes: of one gradient when it is reduced.
    """

    traffic: Traffic = EAGER
    sequence_parallel: bool = True
    attention: Literal["cudnn", "flash2", "scores"] = "cudnn"
    attention_share: float = 1.0
    logits_again: bool = True
    products_again: float = 0.0
    early_stop: bool = True
    float8: Literal["tensorwise", "rowwise"] | None = None
    float8_gathers: bool = False
    float8_messages: bool = False
    overlaps_gradients: bool = False
    regathers_tokens: bool = False
    shares_memory: bool = False
    overlaps_tensor: bool = False
    overlaps_pipeline: bool = False
    ring_context: bool = False
    keeps_parameters: bool = False
    node_rings: bool = True
    gradient_bytes: int = 4


OURS = Software()


def ours(settings: Settings) -> Software:
    """This project's, as these settings run it on a GPU."""
    compiled, recipe = compile.wanted(settings, torch.device("cuda")), settings.training.float8
    traffic = COMPILED if compiled else EAGER
    return Software(
        traffic,
        float8=recipe,
        float8_gathers=recipe == "tensorwise",
        overlaps_gradients=tensor_linear.overlaps_gradients(settings),
        regathers_tokens=tensor_linear.regathers_tokens(settings),
        shares_memory=tensor_linear.shares_memory(settings),
    )
