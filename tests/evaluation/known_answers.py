"""What tests of scores share: a model and a scorer whose answers are known."""

import math

import numpy as np
import torch

from megaarch.evaluation.scorer import Room, Scores
from megaarch.model.loss import TargetLosses


class Uniform(torch.nn.Module):
    """Gives every token the same probability, and the text tokens likewise."""

    def __init__(self, size):
        super().__init__()
        self.one = torch.nn.Parameter(torch.zeros(1))
        self.size = size

    def forward(self, batch, text_tokens):
        nll = torch.full(batch.target_tokens.shape, math.log(self.size))
        return TargetLosses(nll, nll, torch.full_like(nll, math.log(int(text_tokens.sum()))))


class Planted:
    """Gives the text of a choice the log-likelihood that a rule says."""

    def __init__(self, settings, tokenizer, rule):
        self.settings, self.tokenizer, self.rule = settings, tokenizer, rule
        self.objective = settings.data.objective
        self.room = Room([(settings, tokenizer.vocabulary)])
        self.seen = []

    def loglikelihoods(self, pairs):
        texts = [tuple(self.tokenizer.decode(side).strip() for side in pair) for pair in pairs]
        self.seen += texts
        found = np.array([self.rule(*text) for text in texts])
        return Scores(found, found)
