"""Parameters that several pipeline ranks hold: tied embeddings, tables of relative bias."""

from typing import Any

import torch
from torch import distributed

from megaarch.distributed.mesh import Grid
from megaarch.model import Transformer
from megaarch.model.parameter_count import parameter_shapes
from megaarch.parallel import gradients
from megaarch.parallel.stages import Stages


class TiedParameters:
    """ranks: maps each parameter that this pipeline rank and others hold to all ranks that hold it, in
    order. The first of them counts it. Every process makes one at the same time."""

    def __init__(self, model: Transformer, grid: Grid, stages: Stages):
        shapes = parameter_shapes(model.settings, model.position_axes)
        holders = {name: stages.holders(name, model.settings) for name in shapes}
        holders = {name: ranks for name, ranks in holders.items() if len(ranks) > 1}
        rank = grid.rank("pp")
        self.ranks = {name: ranks for name, ranks in holders.items() if rank in ranks}
        self.counted_elsewhere = {name for name, ranks in self.ranks.items() if ranks[0] != rank}
        self.groups: dict[tuple[int, ...], Any] = {}
        # Every process makes the groups of all pipelines: torch names groups by counting them.
        assert grid.mesh is not None
        pipelines = grid.mesh.mesh.flatten(1).t().tolist()
        for ranks in sorted(set(holders.values())):
            of_each = [[pipeline[rank] for rank in ranks] for pipeline in pipelines]
            self.groups[ranks], _ = distributed.new_subgroups_by_enumeration(of_each)

    def sum_gradients(self, model: Transformer) -> None:
        """Sums the gradients of each of these parameters over the ranks that hold it."""
        parameters = dict(model.named_parameters())
        for name, ranks in self.ranks.items():
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = gradients.local(parameter.grad)
            total = grad.contiguous()  # strides differ between ranks, and gloo adds up storage
            distributed.all_reduce(total, group=self.groups[ranks])
            if total is not grad:
                grad.copy_(total)
