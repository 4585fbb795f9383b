"""GPUs, their links and the planner's constants: hardware.yaml, typed."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megaarch import config
from megaarch.config.registry import nearest_of
from megaarch.config.schema import Section
from megaarch.errors import UserError

Rate = Annotated[float, Field(gt=0)]
FILE = Path(__file__).with_name("hardware.yaml")


class Gpu(Section):
    """One kind of GPU in its usual node. peak, product, attention, flash2: TFLOP/s, the last two of
    fused attention over long rows, by the best kernel and by FlashAttention-2. memory: GB in all, of which
    `Cluster.room` is left to tensors. bandwidth (of
    its memory), link (inside a node), network (between nodes; a GPU's share): GB/s in one direction."""

    peak: Rate
    product: Rate
    attention: Rate
    flash2: Rate | None = None
    memory: Rate
    bandwidth: Rate
    link: Rate
    network: Rate
    source: str


class Constants(Section):
    """What a step reaches of a GPU's figures, the same for all of them.

    product, bandwidth, link, network: shares of these. spread: standard deviation of GPUs' speeds over
    their mean. overlap: share of a tensor-parallel message that pieces of its product can hide.
    float8: how many times faster float8 products are. launch: microseconds of a kernel beside its
    work. hop, network_hop: microseconds of a collective's hop, inside a node and between nodes.
    attention_length: tokens of the row at which fused attention runs at half of its rate. The reserve of
    a GPU's memory: context: GB of a process; communicator: GB of each process group; fragments: share of
    the rest.
    """

    context: Rate
    communicator: Rate
    fragments: Annotated[float, Field(ge=0, lt=1)]
    product: Rate
    bandwidth: Rate
    link: Rate
    network: Rate
    spread: Annotated[float, Field(ge=0)]
    overlap: Annotated[float, Field(ge=0, le=1)]
    float8: Rate
    launch: Rate
    hop: Rate
    network_hop: Rate
    attention_length: Rate


class Hardware(Section):
    gpus: dict[str, Gpu]
    constants: Constants


@lru_cache
def hardware() -> Hardware:
    """What hardware.yaml says."""
    return Hardware.model_validate(config.read_yaml(FILE), strict=False)


def gpu(name: str) -> Gpu:
    """The GPU of this name. UserError names the nearest."""
    known = hardware().gpus
    if name not in known:
        hint = nearest_of(name.lower(), known)
        raise UserError(f"--gpu {name}: unknown; it is one of {', '.join(known)}{hint}")
    return known[name]
