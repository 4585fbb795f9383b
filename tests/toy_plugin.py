"""A package outside megaarch, in one file: a semi-autoregressive decoder with an objective of its own,
its preset, an attention kernel and an optimizer. tests/test_plugin.py installs it.

The decoder predicts blocks of four tokens, each from the blocks before it (SAT: Wang et al. 2018).
The token at place i is read off at the row that is fed token i - 4, and rows of a block see each
other. Drawn with ^ the start token:

    block_decoder       tokens     ^ ^ ^ ^ a b c d      R[0:4; 0:4] + R[4:8; 0:8]
                        positions  0 0 0 0 1 1 1 1      axis 1, the block
                                   0 1 2 3 0 1 2 3      axis 2, the place in it
                        targets    a b c d e f g h
"""

from dataclasses import dataclass

import numpy as np
import torch

from megaarch.attention.kernel_interface import Kernel
from megaarch.attention.mask import full
from megaarch.config.catalogue import (
    ARCHITECTURES,
    KERNELS,
    OBJECTIVES,
    OPTIMIZERS,
    PRESETS,
    Architecture,
    Objective,
    Optimizer,
    Preset,
)
from megaarch.data.example import ConvertedStream, Example, Lengths, RowShape
from megaarch.data.feature_converters import finish

BLOCK = 4


class BlockDecoder:
    def __call__(self, example, vocabulary):
        n, m = len(example.inputs), len(example.targets)
        fed = example.targets if example.feed is None else example.feed
        row = np.concatenate([np.full(BLOCK, vocabulary.bos), example.inputs, fed])
        place = np.arange(n + m)
        stream = ConvertedStream(
            row[: n + m].astype(np.int64),
            np.stack([place // BLOCK, place % BLOCK], axis=1),
            [
                full(first, min(first + BLOCK, n + m), 0, min(first + BLOCK, n + m))
                for first in range(0, n + m, BLOCK)
            ],
        )
        return finish(example, (stream,), n + np.arange(m))

    def shape(self, lengths):
        rows = lengths.inputs + lengths.targets
        return RowShape((rows,), lengths.targets, -(-rows // BLOCK))


@dataclass(frozen=True)
class NextBlock:
    """Every token is a target; of those that are fed a share is masked."""

    noise_density: float = 0.1
    name: str = "next_block"

    def __call__(self, tokens, vocabulary, rng):
        tokens = np.asarray(tokens, dtype=np.int64)
        fed = np.where(rng.random(len(tokens)) < self.noise_density, vocabulary.mask, tokens)
        return Example(tokens[:0], tokens, feed=fed)

    def lengths(self, raw):
        return Lengths(0, raw)


def continuation(prefix, scored, vocabulary):
    return [Example(prefix, scored)]


class Dense(Kernel):
    """The dense reference, under another name."""

    def attend(self, inputs):
        return KERNELS["reference"].attend(inputs)


def momentum(groups, training):
    return torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.beta1)


ARCHITECTURES.register(
    Architecture(
        "block_decoder",
        streams=("decoder",),
        looks_ahead=(True,),
        bidirectional_bias=(False,),
        objectives=("next_block",),
        summary="one stack; every token sees its block and the blocks before it",
        mask="blocks of 4",
        converter=BlockDecoder(),
    )
)
OBJECTIVES.register(
    Objective(
        "next_block",
        mixture=((1.0, NextBlock()),),
        continuation=continuation,
        settings=("noise_density",),
        position_axes=2,
    )
)
PRESETS.register(Preset("blocks", "block_decoder", "next_block", ("#123456", "#abcdef"), "p"))
KERNELS.register(Dense("dense"))
OPTIMIZERS.register(Optimizer("momentum", momentum, states=1))
