"""Random tokens for one of Hugging Face's models and for ours of the same weights."""

import torch

from megaarch.attention import mask
from megaarch.attention.mask import Parts
from megaarch.data.batch import Batch, Counts, Stream
from tests.interchange.models import V

N, M, B = 12, 9, 2


def stream(tokens, part, cross=None, segments=None):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)[..., None]
    n = tokens.shape[1]
    return Stream(tokens, positions, Parts.of([[part(0, n, 0, n)]] * B, n, n), cross, segments)


def batch(*streams):
    empty = torch.zeros(B, 0, dtype=torch.long)
    counts = Counts(B, (0,), (0,), (0,), 0, (0,))
    return Batch(streams, empty, empty, empty.float(), empty[0], 0, torch.arange(B), counts)


def inputs_and_call(theirs):
    """Returns the tokens as our batch, and as keyword arguments of their model."""
    tokens, targets = torch.randint(3, V, (B, N)), torch.randint(3, V, (B, M))
    if theirs.config.is_encoder_decoder:
        cross = Parts.of([[mask.full(0, M, 0, N)]] * B, M, N)
        ours = batch(stream(tokens, mask.full), stream(targets, mask.causal, cross))
        return ours, {"input_ids": tokens, "decoder_input_ids": targets}
    if theirs.config.model_type == "bert":
        segments = torch.randint(0, 2, (B, N))
        ours = batch(stream(tokens, mask.full, segments=segments))
        return ours, {"input_ids": tokens, "token_type_ids": segments}
    return batch(stream(tokens, mask.causal)), {"input_ids": tokens}
