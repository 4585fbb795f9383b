"""Our calls of optional libraries, bound to the signatures that their installed sources have, and to
those of the stand-ins. No library is imported: most want a GPU for that."""

import ast
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaarch.attention import KERNELS, AttentionInputs, Parts
from tests.attention import emulation
from tests.attention.cases import prefix
from tests.attention.emulation import StandIn
from tests.attention.runs import tensors

FLASH = "flash_attn_varlen_func"
TORCH = emulation.torch_varlen
if torch.__version__.startswith("2.11."):
    TORCH = emulation.torch_varlen_2_11
LIBRARIES = {  # stand-in, top module, file below it, function
    "flash2": (emulation.flash_attn_2, "flash_attn", "flash_attn_interface.py", FLASH),
    "flash3": (emulation.flash_attn_3, "flash_attn_interface", "", FLASH),
    "flash4": (emulation.flash_attn_4, "flash_attn", "cute/interface.py", FLASH),
    "torch_varlen": (TORCH, "torch", "nn/attention/varlen.py", "varlen_attn"),
    "cudnn_ragged": (emulation.cudnn_sdpa, "cudnn", "sdpa/fwd/torch_op.py", "sdpa"),
    "cudnn_flex": (emulation.cudnn_flex, "cudnn", "flex_attention/api.py", "flex_attn_func"),
    "cudnn_flex's plan": (
        emulation.cudnn_mask_plan,
        "cudnn",
        "flex_attention/plan/builder.py",
        "create_mask_plan",
    ),
}


def calls(name):
    """[(arguments, options)] of our calls, which run on the stand-in."""
    made, stand_in = [], LIBRARIES[name][0]

    def record(*arguments, **options):
        made.append((arguments, options))
        return stand_in(*arguments, **options)

    parts = Parts.of([prefix(p, 12) for p in (0, 5, 12)], 12, 12)
    q, k, v, _ = tensors(parts)
    record.__signature__ = inspect.signature(stand_in)
    functions = {"package": stand_in}
    if name.startswith("cudnn_flex"):
        functions = {"package": emulation.cudnn_flex, "plans": emulation.cudnn_mask_plan}
    libraries = {
        field: StandIn(record if function is stand_in else function)
        for field, function in functions.items()
    }
    kernel = replace(KERNELS[name.partition("'")[0]], **libraries)
    kernel.attend(AttentionInputs(q, k, v, parts))
    return made


def source(name):
    """The file of the library's function, or skipped with the reason."""
    _, module, below, _ = LIBRARIES[name]
    found = importlib.util.find_spec(module)
    if found is None:
        pytest.skip(f"{module} is not installed")
    for folder in found.submodule_search_locations or [found.origin]:
        path = Path(folder) / below if below else Path(folder)
        if path.is_file():
            return path
    pytest.skip(f"the installed {module} has no {below}")


def signature(path, name):
    """The signature of a function of a source file; defaults are what the source says, unread."""
    found = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(found) == 1, f"{path} has no function {name}"
    given, kinds = found[0].args, inspect.Parameter
    assert not given.posonlyargs and given.vararg is None and given.kwarg is None
    required = len(given.args) - len(given.defaults)
    listed = [
        kinds(x.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < required else None)
        for i, x in enumerate(given.args)
    ]
    for x, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        default = kinds.empty if default is None else None
        listed.append(kinds(x.arg, kinds.KEYWORD_ONLY, default=default))
    return inspect.Signature(listed)


@pytest.mark.parametrize("name", LIBRARIES)
def test_our_calls_fit_the_installed_library(name):
    stand_in, *_, function = LIBRARIES[name]
    theirs = signature(source(name), function)
    made = calls(name)
    assert made
    for arguments, options in made:
        bound = theirs.bind(*arguments, **options).arguments
        ours = inspect.signature(stand_in).bind(*arguments, **options).arguments
        assert list(bound) == list(ours)  # what is positional here means the same there


@pytest.mark.parametrize("name", LIBRARIES)
def test_our_calls_fit_the_recorded_signature(name):
    for arguments, options in calls(name):
        inspect.signature(LIBRARIES[name][0]).bind(*arguments, **options)
        assert all(isinstance(x, torch.Tensor) for x in arguments[:3])


def test_signatures_are_read_from_sources(tmp_path):
    path = tmp_path / "library.py"
    path.write_text("def f(a, b=1, *, c, d=2):\n    pass\n")
    read = signature(path, "f")
    read.bind(1, c=3)
    with pytest.raises(TypeError, match="missing a required.*'c'"):
        read.bind(1, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'e'"):
        read.bind(1, c=3, e=4)
