"""What torch decides on the host by asking the driver, or by a tensor's type, answered as on a GPU: which
kernel runs scaled_dot_product_attention, which memory is pinned, whether lists of tensors go through one
kernel, whether what was asked for has arrived. Host arrays that go to the device keep their values at hand,
for the lengths of packed rows."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from megaarch.attention.mask import Parts

ops = torch.ops.aten


@contextmanager
def answered(recorder: Any = None) -> Iterator[None]:
    """Inside of it these questions are answered here. recorder: of waits for events, and of what a
    step pins and plans, which makes its host wait too."""
    from_numpy, plan = torch.from_numpy, Parts.plan
    held: dict[int, torch.Tensor] = {}  # what is pinned, by address

    def with_values(array):
        x = from_numpy(array)
        x.host_values, x.pinned = array, array.ctypes.data in held
        return x

    def pin_memory(x: torch.Tensor, *args) -> torch.Tensor:
        note("pin_memory")
        x.pinned = True
        if not isinstance(x, FakeTensor):
            held[x.data_ptr()] = x
        return x

    def planned(parts: Parts, kernel: str, build: Callable) -> Any:
        if kernel not in parts._plans:
            note(f"plan {kernel}")
        return plan(parts, kernel, build)

    def note(what: str) -> None:
        if recorder in _get_current_dispatch_mode_stack():
            recorder.wait(what)

    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    replaced = (
        (_foreach_utils, "_foreach_supported_types", types),
        (F, "scaled_dot_product_attention", scaled_dot_product_attention),
        (torch, "from_numpy", with_values),
        (torch.Tensor, "pin_memory", pin_memory),
        (torch.Tensor, "is_pinned", lambda x: getattr(x, "pinned", False)),
        (Parts, "plan", planned),
        (torch.Tensor, "item", item),
        (FakeTensor, "tolist", tolist),
        (torch.cuda, "Event", lambda: Event(recorder)),
    )
    with ExitStack() as stack:
        for where, name, mine in replaced:
            stack.enter_context(mock.patch.object(where, name, mine))
        yield


def item(x: torch.Tensor):
    """Reads a host tensor with values (the handle of an operator's parts, its ticket) without a wait."""
    if type(x) is not torch.Tensor:
        return _item(x)
    with _disable_current_modes():
        return _item(x)


_item = torch.Tensor.item


def tolist(x: torch.Tensor) -> list:
    """Ones, of figures that came from the device."""
    return [1.0] * x.numel()


class Event:
    """torch.cuda's, of which the host waits for what was recorded before it."""

    def __init__(self, recorder: Any):
        self.recorder = recorder

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.recorder.wait("event")


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The backend that torch 2.11 and 2.13 take on Hopper (aten/native/transformers/cuda/
    sdp_utils.cpp): cuDNN, else FlashAttention-2, else the memory-efficient one, as far as they are
    enabled and take these arguments."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    grouped = query.shape[-3] != key.shape[-3]
    assert not grouped or enable_gqa, "key heads differ from query heads"
    plain = half and attn_mask is None
    given = (query, key, value)
    if plain and torch.backends.cuda.cudnn_sdp_enabled():
        return ops._scaled_dot_product_cudnn_attention(
            *given, None, True, dropout_p, is_causal, False, scale=scale
        )[0]
    if plain and torch.backends.cuda.flash_sdp_enabled():
        return ops._scaled_dot_product_flash_attention(
            *given, dropout_p, is_causal, False, scale=scale
        )[0]
    assert torch.backends.cuda.mem_efficient_sdp_enabled(), "only the math backend is left"
    assert not grouped, "the memory-efficient backend takes no groups of key heads"
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return ops._scaled_dot_product_efficient_attention(
        *given, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
