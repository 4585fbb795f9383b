"""Generation here and by Hugging Face transformers' `generate`: the same weights and prompts, in turns.

Both answer greedily over caches of their own, in processes of their own, and must give the same tokens in fp32
before anything is timed. Prompts of a batch are of one length, so that neither pads.
"""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from megaarch.attention.mask import causal, full
from megaarch.data.example import ConvertedStream
from megaarch.errors import UserError
from megaarch.inference.decode import Decoding, Layout
from megaarch.inference.prompts import Form, Prompt
from megaarch.inference.sampling import Sampler, Sampling
from megaarch.model import Transformer
from tools.throughput.peers import Apart, TheirModel, models, ratio
from tools.throughput.timing import Clock, Times, rounds

FAMILIES = ("llama", "t5")
FORM = Form(advance=(1,), probe=None, sees_itself=True, ends=(), follows=False)
START = 0  # the token that T5's decoder begins with


class Ours:
    """Answers of our model. tokens: [B, S], of the prompts. Calling it returns the answers [B, A]; the clock
    then has the moment of each token."""

    def __init__(self, model: Transformer, tokens: np.ndarray, answer: int, clock: Clock):
        self.model, self.tokens, self.answer, self.clock = model, tokens, answer, clock
        if model.stacks[-1].cross:
            start = _stream([START], causal)
            self.prompts = [Prompt(FORM, start, _stream(row, full)) for row in tokens]
        else:
            self.prompts = [Prompt(FORM, _stream(row, causal)) for row in tokens]
        self.cache_bytes = 0

    @torch.no_grad()
    def __call__(self) -> np.ndarray:
        device = next(self.model.parameters()).device
        sampler = Sampler(Sampling(), list(self.tokens), [0] * len(self.tokens), None)
        self.clock.start()
        decoding = Decoding(self.model, Layout(device, 1, 0), self.prompts, room=self.answer)
        found = [sampler(decoding.start())]
        self.clock.mark()
        while len(found) < self.answer:
            found.append(sampler(decoding.step(found[-1])))
            self.clock.mark()
        self.cache_bytes = decoding.cache.nbytes
        return np.stack(found, 1)


class Theirs:
    """Generation by the other library's `generate`."""

    def __init__(self, model: TheirModel, tokens: np.ndarray, answer: int, clock: Clock):
        self.model, self.answer, self.clock = model, answer, clock
        self.tokens = torch.from_numpy(tokens).to(next(model.parameters()).device)
        model.generation_config.eos_token_id = None  # answers end by their length alone
        self.cache_bytes = 0

    def __call__(self) -> np.ndarray:
        self.clock.start()
        out = self.model.generate(
            self.tokens,
            attention_mask=torch.ones_like(self.tokens),
            max_new_tokens=self.answer,
            do_sample=False,
            use_cache=True,
            pad_token_id=START,
            return_dict_in_generate=True,
            stopping_criteria=[self.marked],
        )
        self.cache_bytes = cache_bytes(out.cache if "cache" in out else out.past_key_values)
        return out.sequences[:, -self.answer :].cpu().numpy()

    def marked(self, tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called once each token, as it has been chosen; ends nothing."""
        self.clock.mark()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def cache_bytes(cache: Any) -> int:
    """Returns the bytes of their cache's tensors."""
    if hasattr(cache, "self_attention_cache"):
        own, crossed = cache.self_attention_cache, cache.cross_attention_cache
        return cache_bytes(own) + cache_bytes(crossed)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _stream(tokens: Any, shape: Callable[..., tuple]) -> ConvertedStream:
    n = len(tokens)
    return ConvertedStream(np.asarray(tokens), np.arange(n)[:, None], [shape(0, n, 0, n)])


def _serve(
    pipe: Connection,
    which: int,
    threads: int,
    family: str,
    size: dict[str, int],
    half: bool,
    batch: int,
    seed: int,
    device: torch.device,
) -> None:
    torch.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, size["vocabulary_size"], (batch, size["length"]))
    whole = size | {"length": size["length"] + size["answer"]}
    model = models(family, whole, seed)[which].to(device).eval()
    if half:
        model.to(torch.bfloat16)
    side = (Ours, Theirs)[which](model, tokens, size["answer"], Clock(device, flush=False))
    pipe.send((side().tolist(), side.cache_bytes))
    while pipe.recv():
        side()
        pipe.send(side.clock.intervals())


def run(
    families: list[str],
    size: dict[str, int],
    precisions: list[str],
    batches: list[int],
    device: torch.device,
    repetitions: int,
    seed: int,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One record for each (family, precision, batch). size: also `length`, of the prompts, and `answer`."""
    found = []
    for family in families:
        for precision in precisions:
            for batch in batches:
                found.append(_time(family, size, precision, batch, device, repetitions, seed))
                show(_line(found[-1]))
    return found


def _time(
    family: str,
    size: dict[str, int],
    precision: str,
    batch: int,
    device: torch.device,
    repetitions: int,
    seed: int,
) -> dict[str, Any]:
    problem = (family, size, precision == "bf16", batch, seed, device)
    sides = [Apart(_serve, which, *problem) for which in (0, 1)]
    (mine, my_bytes), (other, their_bytes) = (side.told for side in sides)
    label = f"{family} {precision} x{batch}"
    if precision == "fp32" and mine != other:
        raise UserError(f"{label}: greedy tokens of the same weights differ: {mine} and {other}")
    timed = rounds([side.step for side in sides], repetitions, warm_up=1)
    for side in sides:
        side.end()
    (first, rest), (their_first, their_rest) = map(_stages, timed)
    head = {"label": label, "family": family, "precision": precision, "batch": batch, **size}
    figures = {
        f"{name}_{side}": value
        for side, of, later, held in (
            ("ours", first, rest, my_bytes),
            ("theirs", their_first, their_rest, their_bytes),
        )
        for name, value in (
            ("first_token", of.record()),
            ("prefill_tokens_per_second", batch * size["length"] / of.median),
            ("decode_tokens_per_second", batch * (size["answer"] - 1) / later.median),
            ("cache_bytes", held),
        )
    }
    growth = {
        f"growth_{side}": _growth(t) for side, t in zip(("ours", "theirs"), timed, strict=True)
    }
    return (
        head
        | figures
        | growth
        | {"decode_tokens_per_second": figures["decode_tokens_per_second_ours"]}
        | ratio(first, their_first, "first_token_ratio")
        | ratio(rest, their_rest, "decode_ratio")
    )


def _stages(tokens: list[Times]) -> tuple[Times, Times]:
    """The seconds of the first token, and those of all others together, in each repetition."""
    first, *others = tokens
    return first, Times(tuple(map(sum, zip(*(t.seconds for t in others), strict=True))))


def _growth(tokens: list[Times]) -> float:
    """How much longer a token takes in the answer's last quarter than in its first."""
    medians = [token.median for token in tokens[1:]]
    quarter = max(len(medians) // 4, 1)
    return float(np.median(medians[-quarter:]) / np.median(medians[:quarter]))


def _line(r: dict[str, Any]) -> str:
    return (
        f"{r['label']:<16}decode: ours {r['decode_tokens_per_second_ours']:>8,.0f} tokens/s   theirs "
        f"{r['decode_tokens_per_second_theirs']:>8,.0f}   ratio {r['decode_ratio']:.2f} "
        f"({r['decode_ratio_lower_quartile']:.2f} to {r['decode_ratio_upper_quartile']:.2f}); "
        f"first token {r['first_token_ratio']:.2f}"
    )
