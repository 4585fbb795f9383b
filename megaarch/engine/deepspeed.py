"""DeepSpeed as the second data-parallel engine: ZeRO 1, 2 and 3, with or without offload to the CPU.

The model, its loss and the order of its rows are those of every other layout; DeepSpeed shards and
reduces, clips and steps. A checkpoint is the common one: weights and optimizer state by parameter
name, so a run moves between DeepSpeed and the other layouts. (Rajbhandari et al. 2020, ZeRO.)
"""

import os
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]  # is public
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils import cpp_extension

from megaarch.config import ConfigError
from megaarch.config.schema import Settings
from megaarch.data.batch import Batch
from megaarch.distributed.mesh import GRADIENT, Grid
from megaarch.engine import deepspeed_config
from megaarch.engine.base import Engine, Optimizer
from megaarch.model.initialize import initial_value
from megaarch.model.loss import TargetLosses
from megaarch.parallel import recompute
from megaarch.parallel.parallelize import build_model

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
# what holds a group's masters: of ZeRO 1 and 2; of ZeRO 1 in bf16; of ZeRO 3
FLATS = (
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat",
)
LONGEST_BUILD = 10  # minutes; DeepSpeed's parts take less than one


class DeepSpeedEngine(Engine):
    """DeepSpeed holds gradients, optimizer and, at stage 3, parameters.

    ConfigError where DeepSpeed is absent, or its JSON says other than the settings.
    """

    def __init__(self, settings: Settings, grid: Grid):
        deepspeed, config = _deepspeed(grid), deepspeed_config.of(settings, grid.data_ranks)
        stage = config["zero_optimization"]["stage"]
        birth = nullcontext()
        if stage == 3:  # each module's parameters are sharded as it is made
            birth = deepspeed.zero.Init(config_dict_or_path=config)
        with birth, torch.device(grid.device):
            model = build_model(settings.model, settings.data.objective)
        super().__init__(settings, grid, model)
        self.deepspeed, self.config, self.stage = deepspeed, config, stage
        recompute.apply(self.model, settings.parallel.recompute)

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        """Returns DeepSpeed's optimizer, around the one built for the parameters."""
        settings = self.settings
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.zero, outer, *_ = self.deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        seed = settings.training.seed
        for name, parameter in self.model.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            self._put(parameter, initial_value(name, shape, settings.model, seed))
        for state in outer.optimizer.state.values():
            if "step" in state:  # ZeRO 3 has made its state by a step without gradients
                state["step"].zero_()
        return outer

    def forward_backward(self, micro_batches: list[Batch], weight: float) -> torch.Tensor:
        """As the base says. DeepSpeed averages gradients over the ranks."""
        backward = partial(self.zero.backward, scale_wrt_gas=False)
        loss = torch.zeros((), device=self.grid.device)
        for number, batch in enumerate(map(self._local, micro_batches)):
            if number:
                self.zero.step()  # counts a micro-batch that is not the last
            # DeepSpeed's own object is called, which counts micro-batches, and not the model
            loss = loss + self._micro_step(batch, weight, self.zero, backward)
        return self.grid.sum(loss, GRADIENT)

    def forward(self, batch: Batch, text_tokens: torch.Tensor | None = None) -> TargetLosses:
        return self.model(self._local(batch), text_tokens)

    def update(self, optimizer: Optimizer, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base says; DeepSpeed leaves a step out whose gradient is not finite."""
        self.zero.step()
        norm = torch.as_tensor(self.zero.get_global_grad_norm(), device=self.grid.device).detach()
        return norm, torch.full((), self.zero.was_step_applied(), device=norm.device)

    # the common checkpoint: whole tensors by name, of which every rank keeps a slice

    def state(self, optimizer: Optimizer | None) -> tuple[dict, dict]:
        """As the base says, under the keys of other layouts."""
        utils, named = self.deepspeed.utils, dict(self.model.named_parameters())
        weights = {n: self._slice(utils.safe_get_full_fp32_param(p)) for n, p in named.items()}
        state = {}
        if optimizer is None:
            return weights, state
        counts = self._counts()
        for names, group in zip(self.groups, optimizer.param_groups, strict=True):
            options = {key: value for key, value in group.items() if key != "params"}
            for name in names:
                state |= {f"param_groups.{name}.{key}": value for key, value in options.items()}
                if counts:
                    state[f"state.{name}.step"] = counts[0].clone()
                for key in MOMENTS if counts else ():
                    full = utils.safe_get_full_optimizer_state(named[name], key)
                    state[f"state.{name}.{key}"] = self._slice(full)
        return weights, state

    def load_state(self, weights: dict, state: dict, optimizer: Optimizer | None) -> None:
        counts = [] if optimizer is None else self._counts()
        for name, parameter in self.model.named_parameters():
            self._put(parameter, _whole(weights[name]))
            for count in counts:
                count.copy_(_whole(state[f"state.{name}.step"]))
            for key in MOMENTS if counts else ():
                value = _whole(state[f"state.{name}.{key}"])
                self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)

    def _put(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Sets a parameter and its fp32 master to the whole `value`."""
        value = value.to(self.grid.device)
        self.deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        whole = nullcontext()
        if self.stage == 3:  # what rank 0 writes inside reaches the shards
            whole = self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        with torch.no_grad(), whole:
            parameter.copy_(value)

    def _counts(self) -> list[torch.Tensor]:
        """Returns AdamW's counts of steps, of all partitions; SGD has none, and no moments."""
        return [] if self.settings.training.optimizer == "sgd" else _link(self.zero.optimizer)

    def _slice(self, full: torch.Tensor) -> torch.Tensor:
        if self.grid.mesh is None:
            return full.detach().clone()
        mesh = self.grid.submesh("dp_shard")
        return distribute_tensor(full.detach(), mesh, [Shard(0)], src_data_rank=None)  # a copy


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _link(outer) -> list[torch.Tensor]:
    """Makes AdamW's state where no step has been taken yet, and tells each parameter its slice of
    it (DeepSpeed 0.19 does so for the first group only). Returns the counts of steps.

    outer: DeepSpeed's optimizer, of no declared type, around torch's.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    inner: Optimizer = outer.optimizer
    flats = next(getattr(outer, name) for name in FLATS if hasattr(outer, name))
    for flat in flats:
        if not inner.state[flat]:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
    groups = getattr(outer, "bit16_groups", None) or getattr(outer, "bf16_groups", None)
    for group, flat in zip(groups or (), flats, strict=False):
        lazy_init_hp_params_optimizer_state(group, flat, inner.state)
    return [inner.state[flat]["step"] for flat in flats]


def _deepspeed(grid: Grid):
    """The package, with a process group for it to work in."""
    # its log lines of level INFO tell a user nothing
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    if grid.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            [
                "parallel.engine: deepspeed is not installed: pip install 'megaarch[deepspeed]', "
                "or use parallel.engine=torch, which shards as ZeRO does"
            ]
        ) from None
    _check_build_lock()
    if not distributed.is_initialized():  # one process, as for offload on one GPU
        backend = "nccl" if grid.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if grid.device.type == "cpu":
        # it would compile collectives of its own for the processes of a machine, for 40 s; gloo has them
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
    return deepspeed


def _check_build_lock() -> None:
    """DeepSpeed compiles its optimizer where it is first used, and waits for the lock file of another
    process that does. A process killed at that moment leaves its file, and all later ones wait."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    for lock in Path(root).glob("**/cpu_adam/lock"):
        with suppress(FileNotFoundError):  # released meanwhile
            minutes = (time.time() - lock.stat().st_mtime) / 60
            if minutes > LONGEST_BUILD:
                raise ConfigError(
                    [
                        f"parallel.engine: {lock} says that a process has been compiling this "
                        f"part of DeepSpeed for {minutes:.0f} minutes, and DeepSpeed would wait "
                        "for it; if it has ended, remove this file"
                    ]
                )
