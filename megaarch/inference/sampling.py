"""The next token of each row, from logits. Letters of shapes: docs/shapes.md."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaarch.errors import UserError

DRAWS = 64  # uniform numbers that a prompt's generator makes at a time


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: logits are divided by it, from 1e-6 to 1e6; 0 is greedy, None is 1 where top_k or top_p are given and
    else 0. top_k: the most likely tokens that remain; None: all. top_p: the least set of them that holds
    this probability remains (Holtzman et al. 2020). repetition_penalty: divides positive logits, and
    multiplies negative ones, of the tokens of prompt and answer (Keskar et al. 2019, 4.1). seed: together
    with a prompt it gives its draws, whatever other prompts there are.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, fine, want in (
            ("temperature", self.heat == 0 or 1e-6 <= self.heat <= 1e6, "from 1e-6 to 1e6, or 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "from 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and up to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
        ):
            if not fine:
                raise UserError(f"{name}: {getattr(self, name)} is not a number {want}")

    @property
    def heat(self) -> float:
        """The temperature, decided."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.top_k is None and self.top_p == 1 else 1.0


class Sampler:
    """Draws the tokens of a batch's rows. allowed: bool [V] on the device, or None for all. prompts: the
    tokens of each row; keys: of their generators, from `draw_keys`."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[np.ndarray],
        keys: Sequence[int],
        allowed: torch.Tensor | None,
    ):
        self.sampling, self.allowed, self.prompts = sampling, allowed, prompts
        self.generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        self.drawn, self.used = np.empty((len(keys), 0)), 0
        self.seen_BV: torch.Tensor | None = None

    def __call__(self, logits_BV: torch.Tensor) -> np.ndarray:
        """Returns int64 [B]."""
        if self.sampling.repetition_penalty != 1:
            logits_BV = self._penalized(logits_BV)
        if self.allowed is not None:
            logits_BV = logits_BV.masked_fill(~self.allowed, -torch.inf)
        if self.sampling.heat == 0:
            chosen_B = logits_BV.argmax(-1)
        else:
            uniform = torch.from_numpy(self._uniform()).to(logits_BV.device)
            chosen_B = draw(logits_BV, uniform, self.sampling)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, chosen_B[:, None], True)
        return chosen_B.cpu().numpy()

    def select(self, rows: list[int]) -> None:
        """Goes on with these rows alone."""
        self.generators = [self.generators[row] for row in rows]
        self.drawn = self.drawn[rows]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[rows]

    def _penalized(self, logits_BV: torch.Tensor) -> torch.Tensor:
        if self.seen_BV is None:
            self.seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            for row, prompt in enumerate(self.prompts):
                self.seen_BV[row, torch.from_numpy(np.asarray(prompt, dtype=np.int64))] = True
        penalty = self.sampling.repetition_penalty
        lower_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        return torch.where(self.seen_BV, lower_BV, logits_BV)

    def _uniform(self) -> np.ndarray:
        if self.used == self.drawn.shape[1]:
            self.drawn, self.used = np.stack([g.random(DRAWS) for g in self.generators]), 0
        self.used += 1
        return self.drawn[:, self.used - 1]


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Returns a token for each row, int64 [B]: the one in whose share of the probability that remains the
    row's uniform number lies, tokens in the order of their probability."""
    logits_BV, ids_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.heat, None
    if sampling.top_k is not None:
        logits_BV, ids_BV = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]))
    elif sampling.top_p < 1:
        logits_BV, ids_BV = logits_BV.sort(descending=True)
    up_to_BV = logits_BV.double().softmax(-1).cumsum(-1)
    total_B1 = up_to_BV[:, -1:]
    if sampling.top_p < 1:
        last_B1 = (up_to_BV < sampling.top_p * total_B1).sum(-1, keepdim=True)
        total_B1 = up_to_BV.gather(1, last_B1.clamp(max=up_to_BV.shape[1] - 1))
    place_B1 = torch.searchsorted(up_to_BV, uniform_B[:, None] * total_B1, right=True)
    place_B1 = place_B1.clamp(max=up_to_BV.shape[1] - 1)
    return (place_B1 if ids_BV is None else ids_BV.gather(1, place_B1))[:, 0]


def draw_keys(prompts: Sequence[np.ndarray], seed: int) -> list[int]:
    """Returns a key for each prompt, of the seed, its tokens and how often it came before."""
    times: Counter[bytes] = Counter()
    keys = []
    for prompt in prompts:
        content = np.asarray(prompt, dtype=np.int64).tobytes()
        mark = f"{seed} {times[content]} ".encode() + content
        keys.append(int.from_bytes(hashlib.blake2b(mark, digest_size=16).digest()))
        times[content] += 1
    return keys
