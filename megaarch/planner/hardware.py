"""GPUs, their links and the planner's constants: hardware.yaml, typed."""

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megaarch import config
from megaarch.settings import Section

Rate = Annotated[float, Field(gt=0)]
FILE = Path(__file__).with_name("hardware.yaml")


class Gpu(Section):
    """One kind of GPU in its usual node. peak, product: TFLOP/s. memory: GB. bandwidth (of its
    memory), link (inside a node), network (between nodes; a GPU's share): GB/s in one direction."""

    peak: Rate
    product: Rate
    memory: Rate
    bandwidth: Rate
    link: Rate
    network: Rate
    source: str


class Constants(Section):
    """What a step reaches of a GPU's figures, the same for all of them.

    product, bandwidth, link, network: shares of these. attention: of `product`, by fused attention
    over long rows; attention_length: tokens of the row at which it runs at half of that. usable:
    share of the memory that tensors may take.
    """

    usable: Rate
    product: Rate
    bandwidth: Rate
    link: Rate
    network: Rate
    attention: Rate
    attention_length: Rate


class Hardware(Section):
    gpus: dict[str, Gpu]
    constants: Constants


@lru_cache
def hardware() -> Hardware:
    """What hardware.yaml says."""
    return Hardware.model_validate(config.read_yaml(FILE), strict=False)


def gpu(name: str) -> Gpu:
    """The GPU of this name. ValueError names the nearest."""
    known = hardware().gpus
    if name not in known:
        guess = difflib.get_close_matches(name.lower(), known, 1, 0.4)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        raise ValueError(f"--gpu {name}: unknown; it is one of {', '.join(known)}{hint}")
    return known[name]
