"""The corruptions of published code, written a second time from their definitions, token by token.

t5 0.9.4            t5/data/preprocessors.py: random_spans_noise_mask, random_spans_helper,
                    random_prefix_noise_mask
"""

import torch


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
