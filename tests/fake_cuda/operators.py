"""What an operator costs on a GPU: the kernels it launches, the bytes they move, the FLOPs.

The dispatcher shows operators. One that has no kernel for CUDA is opened by its caller (record.py)
until the ones that have are seen, so these tables hold only what the dispatcher cannot tell: kernels
that move less than their operands, operators of several kernels, those that wait for the device, and
attention.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Operator = torch._ops.OpOverload
Bound = dict[str, Any]  # an operator's arguments by name

# Operators of the project, or of a library, that are opened like torch's composites: what they run
# on a GPU is counted, not they.
OPENED = {"megaarch::attend", "megaarch::attend_backward"}

# The host waits for the result of these.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}

# Free: they allocate or look at memory. (Views are found by their schema.)
FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::lift_fresh",
    "aten::is_same_size",
    "aten::resize_",
    "aten::record_stream",
    "aten::_has_compatible_shallow_copy_type",
}

# They write what they are given and do not read it.
OVERWRITE = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::uniform_", "aten::normal_"}

# They read as many rows as they return, not the whole table.
GATHER = {"aten::index_select", "aten::gather", "aten::index", "aten::take_along_dim"}

# They touch as much of `self` as the source holds: the source's argument, and whether that is read.
SCATTER = {
    "aten::index_copy": ("source", False),
    "aten::index_add": ("source", True),
    "aten::scatter": ("src", False),
    "aten::scatter_add": ("src", True),
    "aten::_index_put_impl": ("values", False),
    "aten::index_put": ("values", False),
}

# Kernels of an operator that launches more than one; counted in ATen's CUDA sources.
LAUNCHES = {
    "aten::embedding_dense_backward": 6,  # sort by key, segment offsets, partial sums, their sum
    "aten::native_layer_norm_backward": 2,
    "aten::_fused_rms_norm_backward": 2,
    "aten::index_put": 6,
    "aten::cumsum": 2,
    "aten::sort": 4,
    "aten::logsumexp": 6,  # maximum, difference, exponential, sum, logarithm, sum
    "aten::repeat_interleave": 3,
}
CHUNK, BLOCKS = 65536, 320  # of ATen's multi_tensor_apply: elements a block, blocks a launch
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # a launch, by the number of lists it walks


@dataclass(frozen=True)
class Attention:
    """How an attention operator is recognized. kernel: of rates.ATTENTION. backward: whether it
    computes gradients, at 2.5 times the FLOPs. launches: its kernels."""

    kernel: str
    backward: bool

    @property
    def launches(self) -> int:
        return 3 if self.backward else 1


# By name. An operator's arguments are found by theirs: query, key, is_causal or window_size, and the
# cumulative lengths where rows are packed. To teach the account another one, add its line.
ATTENTION = {
    "aten::_scaled_dot_product_cudnn_attention": Attention("cudnn", False),
    "aten::_scaled_dot_product_cudnn_attention_backward": Attention("cudnn", True),
    "aten::_cudnn_attention_forward": Attention("cudnn", False),
    "aten::_cudnn_attention_backward": Attention("cudnn", True),
    "aten::_scaled_dot_product_flash_attention": Attention("flash2", False),
    "aten::_scaled_dot_product_flash_attention_backward": Attention("flash2", True),
    "aten::_flash_attention_forward": Attention("flash2", False),
    "aten::_flash_attention_backward": Attention("flash2", True),
    "aten::_scaled_dot_product_efficient_attention": Attention("efficient", False),
    "aten::_scaled_dot_product_efficient_attention_backward": Attention("efficient", True),
    "aten::_efficient_attention_forward": Attention("efficient", False),
    "aten::_efficient_attention_backward": Attention("efficient", True),
    "torch_attn::_varlen_attn": Attention("flash2", False),
    "torch_attn::_varlen_attn_backward": Attention("flash2", True),
    "flash_attn::_flash_attn_varlen_forward": Attention("flash2", False),
    "flash_attn::_flash_attn_varlen_backward": Attention("flash2", True),
    "flash_attn_3::fwd": Attention("flash3", False),
    "flash_attn_3::bwd": Attention("flash3", True),
}
QUERY, KEY = ("query", "q"), ("key", "k")
LENGTHS = (("cu_seq_q", "cum_seq_q", "cu_seqlens_q"), ("cu_seq_k", "cum_seq_k", "cu_seqlens_k"))


def name_of(operator: Operator) -> str:
    """Namespace and name without the overload; in-place operators under their functional name, but
    for those that these tables list."""
    name = operator._schema.name
    return name.removesuffix("_") if name.removesuffix("_") in SCATTER | LAUNCHES else name


def bound(operator: Operator, args: tuple, kwargs: dict) -> Bound:
    """The arguments by name, defaults included."""
    schema = operator._schema.arguments
    given = dict(zip((a.name for a in schema), args)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


@cache
def is_free(operator: Operator) -> bool:
    """Whether it launches nothing: a view, or memory that nobody writes."""
    if operator._schema.name in FREE or operator.namespace in ("prim", "prims"):
        return True
    aliases = [r.alias_info for r in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@cache
def is_composite(operator: Operator) -> bool:
    """Whether a GPU runs it as other operators: it has no kernel of its own."""
    if operator._schema.name == "aten::copy_":
        return False
    if operator.namespace != "aten":
        return False
    return composite_key(operator) is not None and not has_kernel(operator, "CUDA")


def composite_key(operator: Operator) -> str | None:
    """The dispatch key under which it is written in terms of others, or None."""
    keys = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return next((key for key in keys if has_kernel(operator, key)), None)


def has_kernel(operator: Operator, key: str) -> bool:
    """Whether one is registered under this dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key)


def call(operator: Operator, args: tuple, kwargs: dict) -> Any:
    """Its result. Where torch has made a number a tensor, it comes here as a number again."""
    kinds = zip((str(a.type) for a in operator._schema.arguments), args)
    if any(kind == "Tensor" and isinstance(x, (bool, int, float)) for kind, x in kinds):
        return operator._overloadpacket(*args, **kwargs)
    return operator(*args, **kwargs)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def size(x: torch.Tensor) -> int:
    """Bytes of its distinct elements: a dimension of stride 0 counts once."""
    count = math.prod(n for n, stride in zip(x.shape, x.stride()) if stride or not n)
    return count * x.element_size()


def moved(operator: Operator, given: Bound, out: Any) -> int:
    """Bytes read and written, each distinct input once and each output once."""
    name, results = name_of(operator), tensors(out)
    if name in GATHER:
        indices = tensors([v for k, v in given.items() if k in ("index", "indices")])
        return 2 * sum(map(size, results)) + sum(map(size, indices))
    if name in SCATTER:
        argument, adds = SCATTER[name]
        rows = sum(size(x) for x in tensors(given[argument]))
        copied = 0 if operator._schema.name.endswith("_") else 2 * size(given["self"])
        return (3 if adds else 2) * rows + copied
    total, seen = 0, set()
    for argument in operator._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = written and (operator._schema.name in OVERWRITE or argument.is_out)
        for x in tensors(given[argument.name]):
            key = (id(x.untyped_storage()), x.storage_offset(), x.shape, x.stride())
            if x.device.type == "cuda" and key not in seen:
                seen.add(key)
                total += size(x) * (written + (not overwritten))
    if not operator._schema.is_mutable:
        total += sum(size(x) for x in results if x.device.type == "cuda")
    return total


def products(operator: Operator, args: tuple, kwargs: dict, out: Any) -> int:
    """FLOPs of a matrix product; 0 of anything else."""
    count = flop_registry.get(operator._overloadpacket)
    if count is None or name_of(operator) in ATTENTION:
        return 0
    return int(count(*args, **kwargs, out_val=out))


def launches(operator: Operator, given: Bound) -> int:
    """Kernels that it launches."""
    name = operator._schema.name
    if name.startswith(("aten::_foreach_", "aten::_fused_ada", "aten::_fused_sgd")):
        return multi_tensor(given)
    return LAUNCHES.get(name_of(operator), 1)


def multi_tensor(given: Bound) -> int:
    """Launches of an operator that walks lists of tensors in chunks."""
    lists = [v for v in given.values() if isinstance(v, (list, tuple)) and tensors(v)]
    walked = [v for v in lists if not all(x.ndim == 0 for x in v)]
    if not walked:
        return 1
    elements = [x.numel() for x in walked[0]]
    blocks = sum(-(-n // CHUNK) for n in elements)
    most = TENSORS[min(max(len(walked), 1), 5)]
    return max(-(-blocks // BLOCKS), -(-len(elements) // most))


def attention_flops(found: Attention, given: Bound) -> float:
    """By exact area: of packed rows from their lengths, where the host knows these."""
    q, k = _first(given, QUERY), _first(given, KEY)
    causal = bool(given.get("is_causal") or given.get("causal"))
    if (window := given.get("window_size")) is not None:
        causal = tuple(window)[1] == 0
    if q.ndim == 3:
        heads, head_size = q.shape[1:]
        pairs = sum(_pairs(n, m, causal) for n, m in zip(*_lengths(given, q, k)))
    else:
        rows, heads, queries, head_size = q.shape
        pairs = rows * _pairs(queries, k.shape[2], causal, top_left=True)
    return 4.0 * heads * head_size * pairs * (2.5 if found.backward else 1)


def _pairs(queries: int, keys: int, causal: bool, top_left: bool = False) -> int:
    if not causal:
        return queries * keys
    i = np.arange(1, queries + 1, dtype=np.int64)
    seen = i if top_left else i + (keys - queries)
    return int(np.clip(seen, 0, keys).sum())


def _lengths(given: Bound, q: torch.Tensor, k: torch.Tensor) -> Iterator[list[int]]:
    for names, rows in zip(LENGTHS, (len(q), len(k))):
        known = getattr(_first(given, names), "host_values", None)
        assert known is not None, "packed attention whose lengths were made on the device"
        assert known[-1] == rows, (known[-1], rows)
        yield np.diff(known).tolist()


def _first(given: Bound, names: tuple[str, ...]) -> Any:
    return next(given[name] for name in names if name in given)
