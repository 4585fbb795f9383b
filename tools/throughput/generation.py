"""Generation by architecture and by turn of a dialogue: time to the first token, tokens a second, cache.

What is timed is what inference/dialogue_cost.py counts, to the token; answers are random, whatever the logits.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from megaarch import config
from megaarch.config import catalogue
from megaarch.config.schema import Settings
from megaarch.inference.decode import Decoding, Layout
from megaarch.inference.dialogue_cost import Turn, dialogue, policies
from megaarch.inference.prompts import prompt
from megaarch.model import Transformer, flops
from megaarch.study.describe import made_up_vocabulary
from megaarch.training.whole_model import build_model
from tools.throughput.timing import Clock, Times, rounds

SENTINELS = 512  # enough for the spans that T5's form gives a long prompt
MODEL = ("hidden_size", "layers", "heads", "feed_forward_size", "vocabulary_size")


class Candidate:
    """Dialogues of a batch with one model under one policy. turns: what they run."""

    def __init__(
        self, head: dict[str, Any], settings: Settings, model: Transformer, turns: list[Turn]
    ):
        self.head, self.settings, self.model, self.turns = head, settings, model, turns
        self.device = next(model.parameters()).device
        self.clock = Clock(self.device, flush=False)
        self.cache_bytes: list[int] = []  # that the tensors hold at each turn's end

    @torch.no_grad()
    def __call__(self) -> list[float]:
        """Runs all turns; returns, turn by turn, the seconds to the first token and of the others."""
        layout, decoding = Layout(self.device, self.turns[0].axes, 0), None
        self.cache_bytes = []
        self.clock.start()
        for turn in self.turns:
            if decoding is None or not turn.held:
                prompts = [turn.prompt] * turn.rows
                decoding = Decoding(self.model, layout, prompts, room=turn.answer)
                decoding.start()
            else:
                decoding.counts = None
                decoding.go_on([turn.stream] * turn.rows)
            self.clock.mark()
            for _ in range(turn.steps):
                decoding.step(np.zeros(turn.rows, dtype=np.int64))
            self.clock.mark()
            assert decoding.counts == turn.counts, "what runs is not what is counted"
            self.cache_bytes.append(decoding.cache.nbytes)
        return self.clock.intervals()

    def result(self, times: list[Times]) -> dict[str, Any]:
        """times: of the stages that a call returns."""
        element = next(self.model.parameters()).element_size()
        turns = [
            {
                "tokens_run": sum(turn.prefill.counts.tokens) // turn.rows,
                "tokens_reused": turn.held,
                "first_token": first.record(),
                "prefill_tokens_per_second": sum(turn.prefill.counts.tokens) / first.median,
                "decode_tokens_per_second": turn.rows * turn.steps / rest.median,
                "flops": flops.forward(self.settings.model, turn.counts).total,
                "cache_bytes": held,
                "cache_bytes_in_use": turn.cache_bytes(self.settings.model, element),
            }
            for turn, first, rest, held in zip(
                self.turns, times[::2], times[1::2], self.cache_bytes, strict=True
            )
        ]
        rate = turns[0]["decode_tokens_per_second"]
        return self.head | {"decode_tokens_per_second": rate, "turns": turns}


def run(
    presets: list[str],
    size: dict[str, int],
    batches: list[int],
    turns: int,
    device: torch.device,
    repetitions: int,
    seed: int,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One record for each preset, policy that differs, and batch; those of a batch alternate. size: also
    `length`, tokens of a turn, and `answer`."""
    results = []
    for batch in batches:
        candidates = [
            candidate
            for preset in presets
            for candidate in _candidates(preset, size, batch, turns, device, seed)
        ]
        timed = rounds(candidates, repetitions, warm_up=1)
        for candidate, times in zip(candidates, timed, strict=True):
            results.append(candidate.result(times))
            for number, turn in enumerate(results[-1]["turns"]):
                show(_line(results[-1]["label"] if not number else "", number, turn))
    return results


def _candidates(
    preset: str, size: dict[str, int], batch: int, turns: int, device: torch.device, seed: int
) -> Iterator[Candidate]:
    settings = _settings(preset, size, turns)
    model, of = build_model(settings).to(device).eval(), settings.model
    vocabulary = made_up_vocabulary(of.vocabulary_size, SENTINELS)
    prompt_of = partial(prompt, settings.data.objective, of.architecture, vocabulary=vocabulary)
    rng, text_ids = np.random.default_rng(seed), np.flatnonzero(vocabulary.text)
    texts = [rng.choice(text_ids, size["length"]) for _ in range(turns)]
    answers = [np.zeros(size["answer"], dtype=np.int64)] * turns
    known: list[list[Turn]] = []
    for policy in reversed(policies(prompt_of, texts[0])):
        found = list(dialogue(prompt_of, texts, answers, policy, batch))
        if policy == "recompute" and any(not any(t.held for t in other) for other in known):
            continue  # the same as reuse, where nothing can be reused
        known.append(found)
        label = f"{preset} {policy} x{batch}"
        head = {"label": label, "preset": preset, "policy": policy, "batch": batch}
        yield Candidate(head, settings, model, found)


def _settings(preset: str, size: dict[str, int], turns: int) -> Settings:
    room = 2 * turns * (size["length"] + size["answer"])  # a form may add to a text
    model = {name: size[name] for name in MODEL} | {"preset": preset, "sequence_length": room}
    architecture = catalogue.ARCHITECTURES[catalogue.PRESETS[preset].architecture]
    if len(architecture.streams) > 1:
        model["target_length"] = room
    return config.resolve({"model": model, "data": {"sentinels": SENTINELS}})


def _line(label: str, number: int, turn: dict[str, Any]) -> str:
    return (
        f"{label:<26}turn {number + 1}: first token {turn['first_token']['median_ms']:>9,.1f} ms"
        f"{turn['prefill_tokens_per_second']:>9,.0f} tokens/s prefill"
        f"{turn['decode_tokens_per_second']:>8,.0f} decode{turn['cache_bytes_in_use'] / 1e6:>9.2f} MB"
    )
