"""Whether a conversion kept what it should: every tensor, and with transformers the logits."""

from pathlib import Path

import torch

from megaarch import settings
from megaarch.attention import parts
from megaarch.attention.parts import Parts
from megaarch.data.batch import Batch, Counts, Stream
from megaarch.interchange.huggingface import Weights
from megaarch.model.transformer import Transformer

ROWS, TOKENS, TARGETS = 2, 24, 16
TOLERANCE = 1e-4  # of the largest logit, in fp32
CLASSES = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
}


def check_tensors(before: Weights, after: Weights, what: str) -> str:
    """A sentence. ValueError names the tensors that only one side has or that differ in a bit."""
    wrong = [
        name
        for name in sorted({**before, **after})
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    ]
    if wrong:
        raise ValueError(f"{what}: {len(wrong)} tensors differ: {', '.join(wrong[:5])}")
    return f"{len(before)} tensors of {what} are equal bit for bit"


@torch.no_grad()
def check_logits(
    weights: Weights, model: settings.Model, folder: Path, family: str, pieces: int
) -> str:
    """A sentence. ValueError where our logits and those that transformers computes from `folder`
    differ, on random tokens below `pieces`; a prefix decoder's with the causal mask that Llama has.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "--verify compares logits with transformers, which is missing: pip install transformers"
        ) from None
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    theirs, found = getattr(transformers, CLASSES[family]).from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:5])
        raise ValueError(f"{folder}: transformers finds no {names}")
    ours = Transformer(model)
    ours.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, model.sequence_length)
    tokens, targets = (
        torch.randint(0, pieces, (ROWS, n), generator=generator) for n in (length, TARGETS)
    )
    batch, given = _inputs(model, tokens, targets[:, :length])
    a, b = ours.eval().logits(batch)[..., :pieces], theirs.eval()(**given).logits[..., :pieces]
    difference, largest = float((a - b).abs().max()), float(b.abs().max())
    if not difference <= TOLERANCE * max(largest, 1e-3):
        raise ValueError(
            f"{folder}: the logits differ by up to {difference:.2e}, where the largest is "
            f"{largest:.2e}"
        )
    return f"logits of {a[..., 0].numel()} random tokens differ by at most {difference:.1e}"


def _inputs(
    model: settings.Model, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The same tokens as our batch, and as arguments of their model."""
    if model.architecture == "encoder_decoder":
        m, n = targets.shape[1], tokens.shape[1]
        cross = Parts.of([[parts.full(0, m, 0, n)]] * ROWS, m, n)
        streams = (_stream(tokens, parts.full), _stream(targets, parts.causal, cross))
        return _batch(*streams), {"input_ids": tokens, "decoder_input_ids": targets}
    shape = parts.full if model.architecture == "encoder" else parts.causal
    return _batch(_stream(tokens, shape)), {"input_ids": tokens}


def _stream(tokens: torch.Tensor, shape, cross: Parts | None = None) -> Stream:
    n = tokens.shape[1]
    positions = torch.arange(n).expand_as(tokens)[..., None]
    return Stream(tokens, positions, Parts.of([[shape(0, n, 0, n)]] * ROWS, n, n), cross)


def _batch(*streams: Stream) -> Batch:
    none = torch.zeros(ROWS, 0, dtype=torch.long)
    counts = Counts(ROWS, (0,), (0,), (0,), 0, (0,))
    return Batch(streams, none, none, none.float(), none[0], 0, torch.arange(ROWS), counts)
