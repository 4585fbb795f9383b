"""Linear layers whose three products, of output and both gradients, run in float8, by torchao.

Each factor is scaled to float8's range by its largest number (dynamic scaling: Micikevicius et al.
2022, section 3) and rounded; products add up in fp32, and their results are in the input's dtype.

    recipe       a scale for         weights, inputs   gradients   weights under FSDP are gathered in
    tensorwise   a whole tensor      e4m3              e5m2        float8
    rowwise      a row of a factor   e4m3              e4m3        bfloat16

What a layer multiplies is the same in every layout: the float8 values of masters under `tensorwise`, of
masters rounded to the input's dtype under `rowwise`.

Importing this file needs torchao (parallel/float8.py says so to a user).
"""

from dataclasses import replace

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8 import float8_linear as torchao

from megaarch.model.layers import MakeLinear

GATHERED = ("tensorwise",)  # the recipes whose weights one scale serves, whatever splits them


class Float8Linear(torchao.Float8Linear):
    """torchao's, for master weights wider than its input. What `linear` returns makes it."""

    casts_first = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.multiply(input, self.weight, self.bias)

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `linear.Linear.multiply`. weight [outputs, inputs]: of any floating
        type, or already float8."""
        if self.casts_first:
            weight = weight.to(x.dtype)
        configuration = self.linear_mm_config, self.config
        out = torchao.matmul_with_hp_or_float8_args.apply(x, weight.t(), *configuration)
        return out if bias is None else out + bias.to(out.dtype)


def linear(recipe: str, *, emulate: bool, sharded: bool) -> MakeLinear:
    """Returns what makes the linear layers of a recipe. emulate: multiply the float8 values in fp32,
    for devices without float8 units. sharded: FSDP gathers their weights."""
    config = replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        enable_fsdp_float8_all_gather=sharded and recipe in GATHERED,
        pad_inner_dim=True,  # where it is a micro-batch's tokens, 16 need not divide it
    )

    def make(inputs: int, outputs: int, bias: bool) -> nn.Linear:
        layer = convert_to_float8_training(nn.Linear(inputs, outputs, bias=bias), config=config)
        assert isinstance(layer, torchao.Float8Linear)
        # The function makes torchao's class alone, but it also works around bugs of inductor.
        layer.__class__ = Float8Linear
        assert isinstance(layer, Float8Linear)
        layer.casts_first = recipe not in GATHERED
        return layer

    return make
