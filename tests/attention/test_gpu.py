"""Without a GPU: kernels' limits on GPUs, what `auto` takes, and the plans that it leaves to build.
On rows of every preset as a run makes them."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from megaarch import config
from megaarch.attention import (
    KERNELS,
    AttentionInputs,
    Parts,
    RelativeBias,
    attend,
    causal,
    choose,
    dispatch,
    full,
    sdpa,
    warm,
)
from megaarch.attention.packages import Gpu, describe
from megaarch.data.dataset import Rows
from megaarch.data.loader import Steps
from megaarch.ingest.prepare import prepare
from tests.attention.cases import CASES, prefix
from tests.attention.gpus import GPUS, MODES, Machine, on_gpu
from tests.attention.runs import tensors
from tests.conftest import PRESETS

BATCHES = 20
H100 = GPUS["H100"]


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def batches(raw):
    """batches(preset) -> for each of the first batches of a run, the parts of its attention calls.
    multiple: of which rows' lengths are stored, as for tensor and context parallelism."""
    made = {}

    def make(preset, multiple=1):
        if (preset, multiple) not in made:
            mine = copy.deepcopy(raw)
            mine["model"] |= {"preset": preset, "sequence_length": 192}
            mine["data"]["sentinels"] = 64
            settings = config.resolve(config.fill_preset(mine))
            prepared = prepare(settings.data, settings.model.vocabulary_size)
            rows = Rows(settings.model, settings.data, prepared, 0)
            size = {"global_batch_size": 8, "micro_batch_size": 8, "multiple": multiple}
            steps = Steps(rows, device_type="cuda", **size)
            made[preset, multiple] = [
                [p for s in batch.streams for p in (s.parts, s.cross) if p is not None]
                for i in range(BATCHES)
                for batch in steps[i]
            ]
        return made[preset, multiple]

    return make


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the calls of torch's attention: (queries, keys, rows, heads, key heads, causal)."""
    made = []

    def record(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        made.append((q.shape[2], k.shape[2], q.shape[0], q.shape[1], k.shape[1], is_causal))
        return q.new_zeros(*q.shape[:3], v.shape[3])

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return made


def shapes_of_cudnn(parts, calls):
    """Returns what cuDNN is called with for these parts."""
    calls.clear()
    q, k, v, _ = tensors(parts, heads=1, key_heads=1, size=1)
    KERNELS["cudnn"].attend(AttentionInputs(q, k, v, parts))
    return set(calls)


def test_what_is_known_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    device = torch.device("cuda")
    assert describe(device) == Gpu((8, 9), 0, deterministic=False)
    for warn_only in (True, False):
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        try:
            assert describe(device).deterministic == (not warn_only)  # a warning is no refusal
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("libraries", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_auto_leaves_no_plan_to_build_after_the_first_batch(
    preset, libraries, batches, machine, calls
):
    machine.has(H100, libraries)
    known = set()
    for i, batch in enumerate(batches(preset)):
        for parts in batch:
            name, _ = choose("auto", *on_gpu(parts), parts)
            # flash-attention's and torch's variable-length kernels build none; all else would.
            assert name in ("cudnn", "flash3", "torch_varlen")
            found = shapes_of_cudnn(parts, calls) if name == "cudnn" else set()
            assert i == 0 or found <= known
            known |= found


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_costs_what_its_area_costs(preset, batches, machine):
    machine.has(H100, libraries=False)
    for parts in batches(preset)[0]:
        name, _ = choose("auto", *on_gpu(parts), parts)
        assert KERNELS[name].cost(parts)[0] == parts.area()


def test_full_rows_keep_cudnn_and_others_say_why_not(machine):
    machine.has(H100, libraries=False)
    n = 256
    for row in ([causal(0, n, 0, n)], [full(0, n, 0, n)]):
        parts = Parts.of([row] * 4, n, n)
        assert choose("auto", *on_gpu(parts), parts)[0] == "cudnn"
    for rows in (
        [prefix(100, n)] * 4,
        [[causal(0, n - 1, 0, n - 1)]] * 4,
        [[causal(0, n, 0, n)], [full(0, n, 0, n)]],
        [[causal(0, n, 0, n)], []],
    ):
        parts = Parts.of(rows, n, n)
        name, reason = choose("auto", *on_gpu(parts), parts)
        assert name == "torch_varlen" and "cudnn: it builds a plan for each shape" in reason


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_padded_to_divide_among_ranks_take_the_kernels_of_rows_that_are_not(
    preset, batches, machine, calls
):
    machine.has(H100, libraries=False)
    known = set()
    for i, (plain, padded) in enumerate(zip(batches(preset), batches(preset, 7), strict=True)):
        for parts, longer in zip(plain, padded, strict=True):
            assert longer.queries % 7 == 0 and longer.queries > parts.queries
            name, _ = choose("auto", *on_gpu(longer), longer)
            assert name == choose("auto", *on_gpu(parts), parts)[0]
            found = shapes_of_cudnn(longer, calls) if name == "cudnn" else set()
            assert i == 0 or found <= known
            known |= found


def test_the_loader_plans_nothing_for_a_kernel_that_auto_leaves_alone():
    parts = warm(Parts.of([prefix(p, 64) for p in (3, 9)], 64, 64), "cuda")
    assert "varlen" in parts._plans and "cudnn" not in parts._plans


def broken(name, parts, gpu, calls):
    """The documented limits, written a second time: what these parts break of a kernel's."""
    hopper, deterministic = gpu.capability[0] == 9, gpu.deterministic
    found = set()
    if name == "cudnn":
        if deterministic:
            found.add("deterministic")
        if gpu.cudnn < 90000 or gpu.cudnn in (91000, 91001):
            found.add("version")
        for queries, keys, *_, is_causal in shapes_of_cudnn(parts, calls):
            if 1 in (queries, keys):
                found.add("one row")
            if gpu.cudnn < 91501 and keys % 128:
                found.add("keys not of 128")
            if hopper and gpu.cudnn < 92600 and keys % 128 == 64 and not is_causal:
                found.add("64 mod 128")
    if name == "flash3" and not hopper:
        found.add("capability")
    if name in ("flash4", "flex_flash") and gpu.capability[0] < 9:
        found.add("capability")
    if name == "flash4" and deterministic and gpu.capability[0] == 12:
        found.add("deterministic")
    if name == "flex_flash" and (deterministic or gpu.capability[0] == 12):
        found.add("no backward")
    if name == "cudnn_flex" and gpu.capability not in ((9, 0), (10, 0), (10, 3)):
        found.add("capability")
    if name == "cudnn_ragged":
        if gpu.cudnn < 91801:
            found.add("version")
        if deterministic and gpu.capability[0] in (8, 12):
            found.add("deterministic")
    return found


def assert_limits_are_known(parts, machine, calls):
    """Each kernel refuses these parts on just those GPUs where they break a limit of it."""
    q, k = on_gpu(parts)
    for mode, gpu in MODES.items():
        machine.has(gpu)
        for name in set(KERNELS) - {"reference", "sdpa", "cpu"}:
            reason = KERNELS[name].cannot_run(AttentionInputs(q, k, k, parts))
            if name == "cudnn" and reason and ("top-left" in reason or "parts" in reason):
                continue  # no call is planned at all
            limits = broken(name, parts, gpu, calls)
            assert (reason is not None) == bool(limits), (mode, name, reason, limits)


@pytest.mark.parametrize("preset", PRESETS)
def test_documented_limits_in_planned_calls_of_presets(preset, batches, machine, calls):
    for batch in batches(preset)[:2]:
        for parts in batch:
            assert_limits_are_known(parts, machine, calls)


AT_LIMITS = {
    "a prefix of one": [prefix(1, 256)] + [prefix(90, 256)] * 3,
    "all but one": [prefix(255, 256)] + [prefix(90, 256)] * 3,
    "one key": [[full(0, 256, 0, 1)]] * 4,
    "one query": [[full(0, 1, 0, 256)]] * 4,
    "one token": [[causal(0, 1, 0, 1)]] * 4,
    "64 mod 128": [[full(0, 192, 0, 192)]] * 4,
    "64 mod 128, causal": [[causal(0, 192, 0, 192)]] * 4,
    "100 keys": [[full(0, 256, 0, 100)]] * 4,
    "all": [[full(0, 256, 0, 256)]] * 4,
}


@pytest.mark.parametrize("rows", AT_LIMITS.values(), ids=AT_LIMITS)
def test_documented_limits_at_their_edge(rows, machine, calls):
    assert_limits_are_known(Parts.of(rows, 256, 256), machine, calls)


@pytest.mark.parametrize("name", CASES)
def test_documented_limits_in_adversarial_masks(name, machine, calls):
    assert_limits_are_known(Parts.of(*CASES[name]), machine, calls)


@pytest.mark.parametrize(
    ("name", "size", "gpu", "runs"),
    [
        ("flash2", 208, Gpu((8, 6), 91900), False),
        ("flash2", 208, Gpu((8, 0), 91900), True),
        ("flash2", 256, Gpu((8, 9), 91900), True),
        ("torch_varlen", 200, Gpu((12, 0), 92000), False),
        ("flash3", 256, H100, True),
        ("flash3", 256, Gpu((9, 0), 91900, deterministic=True), False),
        ("cudnn", 136, H100, False),
        ("cudnn_ragged", 136, H100, False),
        ("flash4", 136, H100, False),
        ("flex_flash", 136, H100, False),
        ("flex", 8, H100, False),
        ("flex", 16, H100, True),
    ],
)
def test_head_sizes(name, size, gpu, runs, machine):
    machine.has(gpu)
    parts = Parts.of([[causal(0, 128, 0, 128)]], 128, 128)
    q, k = on_gpu(parts, size=size)
    assert (KERNELS[name].cannot_run(AttentionInputs(q, k, k, parts)) is None) == runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_ends_with_a_kernel_that_can_run(preset, dtype, batches, machine, calls):
    for (mode, gpu), libraries in itertools.product(MODES.items(), (True, False)):
        machine.has(gpu, libraries)
        for parts in batches(preset)[0]:
            name, _ = choose("auto", *on_gpu(parts, dtype=dtype), parts)
            assert not broken(name, parts, gpu, calls), mode
            assert (name == "sdpa") == (dtype == torch.float32), mode  # in 16 bit a fast one


def test_a_bias_in_deterministic_mode(machine):
    """FlexAttention sums a bias's gradient by atomics; torch's fused kernels do not."""
    machine.has(MODES["H100, deterministic"])
    parts = Parts.of([[full(0, 64, 0, 64)]], 64, 64)
    q, k = on_gpu(parts)
    bias = RelativeBias(torch.zeros(32, 2), True)
    assert "atomics" in KERNELS["flex"].cannot_run(AttentionInputs(q, k, k, parts, bias=bias))
    assert KERNELS["flex"].cannot_run(AttentionInputs(q, k, k, parts)) is None
    assert choose("auto", q, k, parts, bias)[0] == "sdpa"


@pytest.mark.parametrize("rows", [[prefix(3, 8)] * 2, [[full(0, 8, 0, n)] for n in (5, 8)]])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_fallback_never_takes_cudnn(rows, key_heads, monkeypatch):
    """Left to itself, torch tries cuDNN first on Hopper."""
    allowed = []
    kernel = sdpa.sdpa_kernel
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda x: allowed.append(list(x)) or kernel(x))
    parts = Parts.of(rows, 8, 8)
    for call in sdpa.KERNEL.plan(parts).calls:
        q, k = (
            torch.empty(len(x), int(x.max()), heads, 8, dtype=torch.bfloat16, device="meta")
            for x, heads in ((call.q_lengths, 4), (call.k_lengths, key_heads))
        )
        sdpa.run(call, q, k, k, None, 1.0, sdpa.BACKENDS)
    assert allowed and not any(SDPBackend.CUDNN_ATTENTION in backends for backends in allowed)


def test_cudnn_gets_grouped_keys_as_they_are(calls, monkeypatch):
    on_cpu = {"devices": ("cpu",), "dtypes": (torch.float64,), "head_sizes": (8, 1)}
    monkeypatch.setitem(KERNELS, "cudnn", dataclasses.replace(KERNELS["cudnn"], **on_cpu))
    parts = Parts.of([prefix(3, 8)] * 2, 8, 8)
    attend(*tensors(parts, heads=6, key_heads=2)[:3], parts, kernel="cudnn")
    assert {(heads, key_heads) for *_, heads, key_heads, _ in calls} == {(6, 2)}


def test_a_kernel_that_rebuilds_is_never_ranked(monkeypatch):
    """However fast it is."""
    monkeypatch.setattr(dispatch, "RANKED", ("cudnn_ragged", "torch_varlen"))
    fast = dataclasses.replace(KERNELS["cudnn_ragged"], tflops=(900.0, 900.0))
    monkeypatch.setitem(KERNELS, "cudnn_ragged", fast)
    parts = Parts.of([prefix(100, 256)] * 4, 256, 256)
    assert dispatch.ranking(parts, "cuda") == ("torch_varlen",)


def test_of_two_exact_kernels_the_faster_is_first(monkeypatch):
    parts = Parts.of([prefix(100, 256)] * 4, 256, 256)
    assert dispatch.ranking(parts, "cuda")[0] == "flash3"
    parts = Parts.of([[full(0, 256, 0, 256)]] * 4, 256, 256)
    assert dispatch.ranking(parts, "cuda")[:2] == ("cudnn", "flash3")
