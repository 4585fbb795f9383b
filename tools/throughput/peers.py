"""The same model, weights, data and optimizer here and in Hugging Face transformers, in turns.

Their model is made first and its weights are taken over, so that both start from the same point;
in fp32 the two loss curves must then agree, or no time is reported. Each is timed in a process of its
own, as its users run it: in a common one each would step on the heap that the other has left, which
moved the ratio by a tenth. Legend: n input tokens, m targets.
"""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megaarch import interchange
from megaarch.attention.mask import causal, full
from megaarch.config.schema import Training
from megaarch.data.batch import Batch
from megaarch.data.example import Converted, ConvertedStream, RowShape
from megaarch.data.packing import pack
from megaarch.errors import UserError
from megaarch.model import Transformer
from megaarch.training import optimizer
from megaarch.training.host_memory import keep_freed_memory
from tools.throughput.isolate import processes
from tools.throughput.timing import Clock, Times, rounds

# transformers.PreTrainedModel, whose annotations its own calls do not meet
TheirModel = Any

FAMILIES = ("llama", "t5", "bert")
CURVE_STEPS = 5
CURVE_TOLERANCE = 2e-3  # relative, of the loss after that many steps in fp32
IGNORE = -100
LEAST = 4  # tokens of a row and of a vocabulary: one is predicted of each row, and three ids are special


def check_size(size: dict[str, int]) -> None:
    """UserError for a model that cannot be built, or whose rows leave nothing to predict."""
    width, heads = size["hidden_size"], size["heads"]
    if width % (2 * heads):
        raise UserError(
            f"--hidden-size {width} has to be a multiple of twice --heads {heads}: positions turn pairs "
            "of a head's channels"
        )
    for name in ("length", "vocabulary_size"):
        if size[name] < LEAST:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least {LEAST}, not {size[name]}"
            )


def theirs(family: str, size: dict[str, int]) -> TheirModel:
    """Their model of this size, randomly initialized, without dropout."""
    import transformers

    width, heads, layers = size["hidden_size"], size["heads"], size["layers"]
    feed, vocabulary, n = size["feed_forward_size"], size["vocabulary_size"], size["length"]
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=feed,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=n,
            tie_word_embeddings=True,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=feed,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=n,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForMaskedLM(config)
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=feed,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        use_cache=False,
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def example(family: str, size: dict[str, int], rng: np.random.Generator) -> Converted:
    """Random tokens in the family's own task: next tokens, a span corruption's shape, a cloze."""
    n, vocabulary = size["length"], size["vocabulary_size"]
    tokens = rng.integers(3, vocabulary, n)

    def stream(ids: np.ndarray, part: tuple, cross: list | None = None) -> ConvertedStream:
        return ConvertedStream(ids, np.arange(len(ids))[:, None], [part], cross or [])

    if family == "llama":
        index, targets, streams = (
            np.arange(n - 1),
            tokens[1:],
            (stream(tokens, causal(0, n, 0, n)),),
        )
    elif family == "bert":
        index = np.sort(rng.permutation(n)[: round(0.15 * n)])
        targets = rng.integers(3, vocabulary, len(index))
        streams = (stream(tokens, full(0, n, 0, n)),)
    else:
        m = max(2, round(0.223 * n))  # of 512: 114 (Raffel et al. 2020, 3.1.4)
        targets, index = rng.integers(3, vocabulary, m), np.arange(m)
        fed = np.concatenate(([0], targets[:-1]))
        streams = (
            stream(tokens, full(0, n, 0, n)),
            stream(fed, causal(0, m, 0, m), [full(0, m, 0, n)]),
        )
    return Converted(streams, index, targets, np.ones(len(index), dtype=np.float32))


def batches(
    family: str, size: dict[str, int], count: int, seed: int, device: torch.device
) -> list[tuple[Batch, dict[str, torch.Tensor]]]:
    """Returns the examples as our batches and as keyword arguments of their model."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        rows = [[example(family, size, rng)] for _ in range(size["rows"])]
        shape: RowShape = rows[0][0].shape
        ours = pack(rows, shape, pad=0, axes=1, sample_index=range(len(rows)))
        stream, labels = ours.streams[-1], torch.full_like(ours.streams[-1].tokens, IGNORE)
        labels.scatter_(1, ours.target_index, ours.target_tokens)
        arguments = {"input_ids": ours.streams[0].tokens, "labels": labels}
        if family == "llama":  # their labels are shifted inside
            arguments["labels"] = F.pad(labels[:, :-1], (1, 0), value=IGNORE)
        elif family == "t5":
            arguments["decoder_input_ids"] = stream.tokens
        found.append((ours.to(device), {k: v.to(device) for k, v in arguments.items()}))
    return found


class Side:
    """One of the two: a model with its optimizer. `loss` takes its half of a batch. autocast: in
    bf16, for a model that does not cast by itself."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[Any], torch.Tensor], autocast: bool):
        self.model, self.loss, self.autocast = model, loss, autocast
        self.optimizer = optimizer.build(model, Training(learning_rate=1e-3))
        self.device = next(model.parameters()).device

    def step(self, batch: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def models(family: str, size: dict[str, int], seed: int) -> tuple[Transformer, TheirModel]:
    """Ours and theirs, of the same weights."""
    torch.manual_seed(seed)
    their_model = theirs(family, size)
    description = their_model.config.to_dict()
    model = interchange.settings_from(description)
    our_model = Transformer(model)
    our_model.load_state_dict(interchange.from_hf(their_model.state_dict(), model, family))
    return our_model, their_model


def pair(
    family: str, size: dict[str, int], half: bool, seed: int, device: torch.device
) -> tuple[Side, Side]:
    """Ours and theirs, from the same weights."""
    our_model, their_model = models(family, size, seed)

    def our_loss(batch: Batch) -> torch.Tensor:
        out = our_model(batch)
        return (out.nll * batch.target_weights).sum() / batch.target_weights.sum()

    def their_loss(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        return their_model(**arguments).loss

    our_model.to(device).train()
    our_model.compute_dtype = torch.bfloat16 if half else None
    their_model.to(device).train()
    return Side(our_model, our_loss, False), Side(their_model, their_loss, half)


def run(
    families: list[str],
    size: dict[str, int],
    precisions: list[str],
    device: torch.device,
    repetitions: int,
    seed: int,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One record for each (family, precision)."""
    found = []
    for family in families:
        curve = curves(family, size, seed, device)
        worst = max(abs(a - b) / abs(b) for a, b in zip(*curve, strict=True))
        if not worst <= CURVE_TOLERANCE:
            raise UserError(f"{family}: losses of the same training differ: {curve}")
        for precision in precisions:
            record = _time(family, size, precision, device, repetitions, seed)
            record |= {"loss_ours": curve[0], "loss_theirs": curve[1], "loss_difference": worst}
            found.append(record)
            show(
                f"{family:<6} {precision:<5} ours {record['ours']:>10,.0f} tokens/s   theirs "
                f"{record['theirs']:>10,.0f}   ratio {record['ratio']:.2f} "
                f"({record['ratio_lower_quartile']:.2f} to {record['ratio_upper_quartile']:.2f})"
            )
    return found


def curves(
    family: str, size: dict[str, int], seed: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Losses of the first steps of the same training in fp32, ours and theirs."""
    sides = pair(family, size, False, seed, device)
    data = batches(family, size, CURVE_STEPS, seed, device)
    ours, theirs = ([float(side.step(batch[i])) for batch in data] for i, side in enumerate(sides))
    return ours, theirs


class Apart:
    """A side in a process of its own, that steps when told to. serve: what runs there; it tells one thing
    at first, `told`, and the seconds of each step. which: 0 ours, 1 theirs."""

    def __init__(self, serve: Callable[..., None], which: int, *problem: Any):
        context = processes(serve.__module__, "transformers.modeling_utils")
        self.pipe, other = context.Pipe()
        threads = torch.get_num_threads()
        arguments = (other, which, threads, *problem)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.told = self._answer()

    def step(self) -> list[float]:
        return self._answer(True)

    def end(self) -> None:
        self.pipe.send(False)
        self.process.join()

    def _answer(self, *asked: bool) -> Any:
        try:
            for word in asked:
                self.pipe.send(word)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("peers: the process of a side ended; what it says is above") from None


def _serve(
    pipe: Connection,
    which: int,
    threads: int,
    family: str,
    size: dict[str, int],
    half: bool,
    seed: int,
    device: torch.device,
) -> None:
    torch.set_num_threads(threads)
    if which == 0 and device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    side = pair(family, size, half, seed, device)[which]
    ((ours, arguments),) = batches(family, size, 1, seed, device)
    clock = Clock(device)
    pipe.send(sum(ours.counts.tokens))
    while pipe.recv():
        clock.start()
        side.step((ours, arguments)[which])
        clock.mark()
        pipe.send(clock.intervals())


def _time(
    family: str,
    size: dict[str, int],
    precision: str,
    device: torch.device,
    repetitions: int,
    seed: int,
) -> dict[str, Any]:
    problem = (family, size, precision == "bf16", seed, device)
    sides = [Apart(_serve, which, *problem) for which in (0, 1)]
    timed = rounds([side.step for side in sides], repetitions)
    for side in sides:
        side.end()
    tokens = sides[0].told
    (mine,), (other,) = timed
    return {
        "label": f"{family} {precision}",
        "family": family,
        "precision": precision,
        **size,
        "ours": tokens / mine.median,
        "theirs": tokens / other.median,
        "step_ours": mine.record(),
        "step_theirs": other.record(),
        **ratio(mine, other),
    }


def ratio(mine: Times, other: Times, of: str = "ratio") -> dict[str, float]:
    """How many times faster ours is, by neighbours in time: the median, and its quartiles."""
    ratios = np.array(other.seconds) / np.array(mine.seconds)
    lower, middle, upper = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {of: middle, f"{of}_lower_quartile": lower, f"{of}_upper_quartile": upper}
