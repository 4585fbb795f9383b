"""Parameters that several pipeline ranks hold: tied embeddings, tables of relative bias."""

import torch
from torch import distributed

from megaarch.distributed.mesh import Grid
from megaarch.model import Transformer
from megaarch.parallel import gradients
from megaarch.parallel.stages import Stages


class Shared:
    """names: of this rank's parameters, those that other pipeline ranks hold too, each with all
    ranks that hold it, in order. Every process makes one at the same time."""

    def __init__(self, model: Transformer, grid: Grid, stages: Stages):
        with torch.device("meta"):
            whole = Transformer(model.settings, position_axes=model.position_axes)
        held = {n: stages.holders(n, model.settings) for n, _ in whole.named_parameters()}
        held = {name: on for name, on in held.items() if len(on) > 1}
        rank = grid.rank("pp")
        self.names = {name: on for name, on in held.items() if rank in on}
        self.counted_elsewhere = {name for name, on in self.names.items() if on[0] != rank}
        self.groups: dict[tuple[int, ...], distributed.ProcessGroup] = {}
        # Every process makes the groups of all pipelines: torch names groups by counting them.
        pipelines = grid.mesh.mesh.flatten(1).t().tolist()
        for on in sorted(set(held.values())):
            for pipeline in pipelines:
                ranks = [pipeline[place] for place in on]
                group = distributed.new_group(ranks)
                if distributed.get_rank() in ranks:
                    self.groups[on] = group

    def add(self, model: Transformer) -> None:
        """Sums the gradients of each shared name over the ranks that hold it."""
        parameters = dict(model.named_parameters())
        gradients.settle(parameters[name] for name in self.names)
        for name, on in self.names.items():
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = gradients.local(parameter.grad)
            total = grad.contiguous()  # strides differ between ranks, and gloo adds up storage
            distributed.all_reduce(total, group=self.groups[on])
            if total is not grad:
                grad.copy_(total)
