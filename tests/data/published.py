"""The corruptions of published code, written a second time from their definitions, token by token.

`python -m tests.data.published` prints the figures of docs/objectives.md, theirs beside megaarch's.

t5 0.9.4            t5/data/preprocessors.py: random_spans_noise_mask, random_spans_helper,
                    random_prefix_noise_mask
fairseq 0.12.2      fairseq/data/denoising_dataset.py: add_whole_word_mask, add_insertion_noise
GLM                 github.com/THUDM/GLM at a2e509c, blocklm_utils.py: construct_blocks, sample_spans
XLNet               github.com/zihangdai/xlnet at 1b61bf2, data_utils.py: _sample_mask
"""

import itertools
import math

import numpy as np
import torch

from megaarch.data.example import generator
from megaarch.data.objectives.blank_infilling import SpanInfilling
from megaarch.data.objectives.denoising import Denoising
from megaarch.data.objectives.permutation import PermutationLM
from tests.data.mixtures import MIXTURES
from tests.data.toy_vocabulary import toy_text, toy_vocabulary

VOCABULARY = toy_vocabulary()
MASK = VOCABULARY.mask


def t5_counts(
    lengths: torch.Tensor, density: float, span: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise tokens, spans) of rows of these lengths [N], in float32."""
    noise = torch.round(lengths.float() * torch.tensor(density, dtype=torch.float32))
    noise = torch.minimum(noise.clamp(min=1), lengths - 1)
    spans = torch.round(noise / torch.tensor(span, dtype=torch.float32)).clamp(min=1)
    return noise.long(), spans.long()


def t5_raw(inputs: int, density: float, span: float) -> int:
    """Raw tokens that fill `inputs` tokens, in float64."""

    def filled(raw: int) -> int:
        noise = round(raw * density)
        return raw - noise + round(noise / span) + 1

    raw = inputs - 1
    while filled(raw + 1) <= inputs:
        raw += 1
    return raw


def t5_shortest_prefix(raw: int, density: float) -> int:
    share = torch.tensor(1 - 2 * density, dtype=torch.float32)
    shortest = torch.round(share * torch.tensor(raw - 1, dtype=torch.float32))
    return min(max(int(shortest), 1), raw - 1)


def fairseq_spans(words: int, density: float, span: float, rng) -> list[int]:
    """Lengths of the spans, in words."""
    budget = math.ceil(float(torch.tensor(words, dtype=torch.float32) * density))
    lengths: list[int] = []
    while sum(lengths) < budget:
        lengths.append(int(rng.poisson(span)))
    lengths[-1] -= sum(lengths) - budget
    return lengths


def fairseq_infilling(words: list[list[int]], density: float, span: float, rng) -> list[int]:
    """The corrupted tokens of these words."""
    lengths = fairseq_spans(len(words), density, span, rng)
    inserted = lengths.count(0)
    lengths = [length for length in lengths if length]
    starts = rng.permutation(len(words))[: len(lengths)].tolist()
    places, gone = set(), set()
    for start, length in zip(starts, lengths, strict=True):
        places.add((start, 0))
        tail = [
            (w, t)
            for w in range(start, min(start + length, len(words)))
            for t in range(len(words[w]))
        ]
        gone.update(tail[1:])
    kept = [
        MASK if (w, t) in places else token
        for w, word in enumerate(words)
        for t, token in enumerate(word)
        if (w, t) not in gone
    ]
    is_mask = rng.permutation([True] * inserted + [False] * len(kept))
    rest = iter(kept)
    return [MASK if mask else next(rest) for mask in is_mask]


def glm_lengths(raw: int, density: float, span: float, rng) -> list[int]:
    """Lengths of the [MASK] spans in the order of their places."""
    sizes = range(1, 40)
    weights = np.array([math.exp(k * math.log(span) - math.lgamma(k + 1)) for k in sizes])
    lengths: list[int] = []
    while sum(lengths) < int(density * raw):
        lengths.append(int(rng.choice(sizes, p=weights / weights.sum())))
    return rng.permutation(lengths).tolist()


def glm_spans(lengths: list[int], raw: int, rng) -> list[tuple[int, int]]:
    """(start, end) of spans of these lengths in a document of `raw` tokens."""
    slack = raw - sum(lengths) - (len(lengths) - 1)
    places = sorted(int(rng.integers(slack + 1)) for _ in lengths)
    spans, used = [], 0
    for place, length in zip(places, lengths, strict=True):
        spans.append((used + place, used + place + length))
        used += length + 1
    return spans


def xlnet_spans(starts: list[bool], alpha: int, goal: int, rng) -> list[bool]:
    """Which tokens the spans take; starts: where words begin. At most `goal`."""
    raw, masked, at = len(starts), [False] * len(starts), 0
    shares = np.array([1 / n for n in range(1, 6)])
    while at < raw and sum(masked) < goal:
        n = min(int(rng.choice([1, 2, 3, 4, 5], p=shares / shares.sum())), goal - sum(masked))
        context = n * alpha
        left = int(rng.integers(context))
        begin = at + left
        while begin < raw and not starts[begin]:
            begin += 1
        if begin >= raw or begin + n >= raw:
            break
        for place in range(begin, begin + n):
            masked[place] = True
        at = begin + n + (context - left)
    return masked


def xlnet_targets(starts: list[bool], alpha: int, goal: int, rng) -> list[bool]:
    masked = xlnet_spans(starts, alpha, goal, rng)
    while sum(masked) < goal:
        masked[int(rng.integers(len(masked)))] = True
    return masked


def one_token_words(raw: int) -> np.ndarray:
    """`raw` different tokens, each a word, none a sentence's end."""
    return np.array([i for i in range(0, 1000, 2) if i % 10])[:raw]


def infilling_facts(inputs, raw: int) -> tuple[int, int, int]:
    """(tokens removed, masks, pairs of masks that touch) of BART's inputs from `raw` tokens."""
    is_mask = np.asarray(inputs) == MASK
    return raw - int((~is_mask).sum()), int(is_mask.sum()), int((is_mask[1:] & is_mask[:-1]).sum())


def span_facts(spans: list[tuple[int, int]]) -> tuple[int, int, int]:
    """(gaps between spans, those of one token, tokens in spans)."""
    gaps = [b[0] - a[1] for a, b in itertools.pairwise(spans)]
    return len(gaps), gaps.count(1), sum(end - start for start, end in spans)


def glm_spans_of(example) -> list[tuple[int, int]]:
    """(start, end) of the spans of a blank-infilling example, from left to right."""
    ends = np.flatnonzero(example.targets == VOCABULARY.eop)
    sizes = np.diff(ends, prepend=-1) - 1
    masks = example.feed_positions[ends, 0]
    spans, taken = [], 0
    for mask, size in sorted(zip(masks.tolist(), sizes.tolist(), strict=True)):
        spans.append((mask + taken, mask + taken + size))
        taken += size - 1
    return spans


def visible(tokens: int, targets: int) -> float:
    """Mean number of tokens that a target sees of its own segment."""
    return tokens - targets + (targets - 1) / 2


Figure = tuple[str, float, float]  # what, published, megaarch


def figures(rows: int = 1000) -> list[Figure]:
    """Over rows of 512 tokens, each of them a word."""
    text = np.resize(one_token_words(400), 512)
    return [
        *ul2_figures(text, rows),
        *bart_figures(text, rows),
        *glm_figures(text, rows),
        *xlnet_figures(rows),
    ]


def ul2_figures(text: np.ndarray, rows: int) -> list[Figure]:
    """Published: the listing in the paper's appendix, by its defaults."""
    share, denoiser = MIXTURES["ul2"][-1]
    suffixes = [len(denoiser(text, VOCABULARY, generator(0, k)).targets) - 1 for k in range(rows)]
    listing = (512 - t5_shortest_prefix(512, 0.5) + 1) / 2
    return [
        ("`ul2`: rows of the S-denoiser, %", 100 / 7, 100 * share),
        ("`ul2`: mean suffix of the S-denoiser, %", listing / 5.12, np.mean(suffixes) / 5.12),
    ]


def bart_figures(text: np.ndarray, rows: int) -> list[Figure]:
    rng, words = np.random.default_rng(0), [[word] for word in text.tolist()]
    theirs = [fairseq_infilling(words, 0.3, 3.0, rng) for _ in range(rows)]
    ours = [Denoising()(text, VOCABULARY, generator(0, k)).inputs for k in range(rows)]
    sides = [np.mean([infilling_facts(x, 512) for x in side], axis=0) for side in (theirs, ours)]
    return [
        ("`denoising`: tokens removed, %", *(side[0] / 5.12 for side in sides)),
        ("`denoising`: masks a row", *(side[1] for side in sides)),
        ("`denoising`: masks a row that touch the one before", *(side[2] for side in sides)),
    ]


def glm_figures(text: np.ndarray, rows: int) -> list[Figure]:
    rng, objective = np.random.default_rng(0), SpanInfilling()
    theirs = [glm_spans(glm_lengths(512, 0.15, 3.0, rng), 512, rng) for _ in range(rows)]
    ours = [glm_spans_of(objective(text, VOCABULARY, generator(0, k))) for k in range(rows)]
    sides = [np.sum([span_facts(x) for x in side], axis=0) for side in (theirs, ours)]
    documents = [toy_text(512, k, eos_every=512) for k in range(rows)]
    targets = np.concatenate(
        [objective(x, VOCABULARY, generator(0, k)).targets for k, x in enumerate(documents)]
    )
    held = 100 * (targets == VOCABULARY.eos).sum() / (targets == VOCABULARY.eop).sum()
    return [
        ("`blank_infilling`: tokens in [MASK] spans, %", *(s[2] / rows / 5.12 for s in sides)),
        ("`blank_infilling`: gaps of one token, %", *(100 * s[1] / s[0] for s in sides)),
        ("`blank_infilling`: spans that hold an end of document, one in 512 tokens, %", 0.0, held),
    ]


def xlnet_figures(rows: int) -> list[Figure]:
    """Returns the counts of published rows: two halves of 256 tokens, without the memory."""
    rng, begins = np.random.default_rng(0), np.ones(512, dtype=bool)
    theirs = [sum(xlnet_spans(begins.tolist(), 6, 85, rng)) for _ in range(rows)]
    ours = [PermutationLM().spans(begins, generator(0, k)).sum() for k in range(rows)]
    halves = (42 * visible(256, 42) + 43 * (256 + visible(256, 43))) / 85
    return [
        ("`permutation_lm`: targets in spans, of 85", np.mean(theirs), np.mean(ours)),
        ("`permutation_lm`: tokens that a target sees", halves, visible(512, 85)),
    ]


if __name__ == "__main__":
    for what, theirs, ours in figures():
        print(f"| {what} | {theirs:.1f} | {ours:.1f} |")
