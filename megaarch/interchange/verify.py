"""Whether a conversion kept what it should: every tensor, and with transformers the logits."""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from megaarch.attention import mask
from megaarch.attention.mask import Parts
from megaarch.checkpoint.lazy import Weights, like
from megaarch.config import schema
from megaarch.data.batch import Batch, Counts, Stream
from megaarch.errors import UserError
from megaarch.interchange.families import FAMILIES
from megaarch.model.parameter_count import parameter_shapes
from megaarch.model.transformer import Transformer
from megaarch.training.memory_check import out_of_memory

ROWS, TOKENS, TARGETS = 2, 24, 16
# Both models run in fp64, where transformers computes some norms and softmaxes in fp32 all the same;
# so they may differ by a multiple of what fp32 changes in our logits, and at most by a share of the
# largest, which a model must not reach whatever its rounding errors do.
OWN_ERRORS, LEAST, MOST = 8, 1e-6, 0.05
BYTES = 12  # a parameter, as measured


def check_tensors(before: Weights, after: Weights, what: str) -> str:
    """A sentence. UserError names the tensors that only one side has or that differ in a bit."""
    wrong = [
        name
        for name in sorted({*before, *after})
        if name not in before or name not in after or not _same_bits(before[name], after[name])
    ]
    if wrong:
        raise UserError(f"{what}: {len(wrong)} tensors differ: {', '.join(wrong[:5])}")
    return f"{len(before)} tensors of {what} are equal bit for bit"


def check_shapes(weights: Weights, model: schema.Model, position_axes: int, what: str) -> None:
    """UserError names a tensor of `what` that is missing, left over, of another shape than the model's or
    not of floating point. None is read."""
    shapes, given = parameter_shapes(model, position_axes), like(weights)
    for name in sorted({*shapes, *given}):
        if name not in given:
            fault = f"lacks {name}"
        elif name not in shapes:
            fault = f"has {name}, which is no tensor"
        elif given[name].shape != shapes[name]:
            fault = f"has {name} of shape {list(given[name].shape)} for {list(shapes[name])}"
        elif not given[name].is_floating_point():
            fault = f"has {name} of {given[name].dtype} for a number of floating point"
        else:
            continue
        raise UserError(f"{what} {fault} of the model in its settings: convert it again")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same in all, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


def cannot_run(weights: Weights) -> str | None:
    """Why logits cannot be compared here, or None."""
    if find_spec("transformers") is None:
        return "transformers is missing: pip install transformers"
    need, free = BYTES * sum(t.numel() for t in like(weights).values()), _free_bytes()
    if need > free:
        return f"it takes {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free"
    return None


def _free_bytes() -> float:
    """Returns the free bytes of the machine and of this process's control group, the lesser; infinite where
    neither is told."""
    free = [float("inf")]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for group in _control_groups():
        with suppress(OSError, ValueError):  # "max" where there is no limit
            limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
            free.append(int(limit) - int(used) + _cached(group))
    return min(free)


def _cached(group: Path) -> int:
    """Returns the bytes of files that a control group's memory counts, which give way to what needs it."""
    with suppress(OSError, ValueError):
        lines = (group / "memory.stat").read_text().splitlines()
        found = dict(line.split() for line in lines)
        return int(found["active_file"]) + int(found["inactive_file"])
    return 0


def _control_groups(
    process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """Returns the control groups that hold this process, from its own (a SLURM step's) up to the root."""
    own = Path()
    with suppress(OSError):
        lines = process.read_text().splitlines()
        own = Path(next((line[4:] for line in lines if line.startswith("0::/")), ""))
    return [root / group for group in (own, *own.parents)]


@torch.no_grad()
def check_logits(
    weights: Weights, model: schema.Model, folder: Path, family: str, pieces: int
) -> str:
    """A sentence. UserError where our logits and those that transformers computes from `folder`
    differ, on random tokens below `pieces`; a prefix decoder's with the causal mask that Llama has.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, model.sequence_length)
    tokens, targets = (
        torch.randint(0, pieces, (ROWS, n), generator=generator) for n in (length, TARGETS)
    )
    batch, given = _inputs(model, tokens, targets[:, :length])
    theirs = _their_logits(folder, family, given)[..., :pieces]
    ours = Transformer(model)
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    single = ours.eval().logits(batch)[..., :pieces]
    double = ours.double().logits(batch)[..., :pieces]
    own = float((single - double).abs().max())
    difference, largest = float((double - theirs).abs().max()), float(theirs.abs().max())
    room = min(max(OWN_ERRORS * own, LEAST * max(largest, 1e-3)), MOST * max(largest, 1e-3))
    beside = f"where fp32's own error is {own:.1e}"
    if not difference <= room:
        raise UserError(
            f"{folder}: the logits differ by up to {difference:.1e}, {beside} and the largest logit "
            f"{largest:.1e}"
        )
    return f"logits of {theirs[..., 0].numel()} random tokens differ by at most {difference:.1e}, {beside}"


def _their_logits(folder: Path, family: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """In fp64. UserError where transformers cannot load the folder or finds no tensor for a name."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--verify compares logits with transformers, which is missing: pip install transformers"
        ) from None
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        theirs, found = getattr(transformers, FAMILIES[family].hf_class).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            chunk_size_feed_forward=0,  # any other has to divide the length
        )
        if not found["missing_keys"]:
            return theirs.eval().double()(**given, return_dict=True).logits
    except Exception as error:  # of many kinds, by what its config classes and layers find
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: transformers {transformers.__version__} cannot run it, so it is not verified "
            f"(--no-verify goes on without): {type(error).__name__}: {reason}"
        ) from error
    names = ", ".join(sorted(found["missing_keys"])[:5])
    raise UserError(f"{folder}: transformers finds no {names}")


def _inputs(
    model: schema.Model, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Returns the tokens as our batch, and as arguments of their model."""
    if model.architecture == "encoder_decoder":
        m, n = targets.shape[1], tokens.shape[1]
        cross = Parts.of([[mask.full(0, m, 0, n)]] * ROWS, m, n)
        streams = (_stream(tokens, mask.full), _stream(targets, mask.causal, cross))
        return _batch(*streams), {"input_ids": tokens, "decoder_input_ids": targets}
    shape = mask.full if model.architecture == "encoder" else mask.causal
    return _batch(_stream(tokens, shape)), {"input_ids": tokens}


def _stream(tokens: torch.Tensor, shape, cross: Parts | None = None) -> Stream:
    n = tokens.shape[1]
    positions = torch.arange(n).expand_as(tokens)[..., None]
    return Stream(tokens, positions, Parts.of([[shape(0, n, 0, n)]] * ROWS, n, n), cross)


def _batch(*streams: Stream) -> Batch:
    none = torch.zeros(ROWS, 0, dtype=torch.long)
    counts = Counts(ROWS, (0,), (0,), (0,), 0, (0,))
    return Batch(streams, none, none, none.float(), none[0], 0, torch.arange(ROWS), counts)
