"""Results and probes of a made-up study in which each argument has what its rule asks for."""

from megaarch.evaluation.record_schema import Machine
from megaarch.probes.attention_rank import Attention, Block, Ranks, Spectrum
from megaarch.probes.catalogue import Probed
from megaarch.probes.dialogue import Dialogue
from megaarch.probes.difficulty import Difficulty
from megaarch.probes.estimate import Estimate
from megaarch.probes.in_context_regression import Learner, Regressed, Regression
from megaarch.probes.linear_probe import Representation
from megaarch.probes.mask_speed import Throughput
from megaarch.probes.position import Layer, Positions, Stream
from tests.study.example_results import example_results

CELLS = {  # name: (architecture, objective, positions)
    "gpt": ("causal_decoder", "full_lm", "rope"),
    "prefix": ("prefix_decoder", "prefix_lm", "rope"),
    "encdec": ("encoder_decoder", "prefix_lm", "rope"),
    "masked": ("encoder", "masked_lm", "rope"),
    "gpt-blind": ("causal_decoder", "full_lm", "none"),
    "prefix-blind": ("prefix_decoder", "prefix_lm", "none"),
    "masked-blind": ("encoder", "masked_lm", "none"),
}
RIGHT = {"gpt": 0.8, "prefix": 0.4, "encdec": 0.4, "masked": 0.3}
ITEMS = 200
TEXTS = 40


def estimate(value: float, half: float = 0.01) -> Estimate:
    return Estimate(value=value, interval=[value - half, value + half], items=32)


def results() -> dict:
    """Cells of the names above, of one seed. Bits per byte are 2 with positions; without, 2.1 of gpt and 2.5."""
    found = example_results()
    made = []
    for name, (architecture, objective, positions) in CELLS.items():
        bits = 2.0 if positions == "rope" else 2.1 if name.startswith("gpt") else 2.5
        cell = dict(found["cells"][0])
        amounts = [20 * bits + 0.1 * (i % 3) for i in range(TEXTS)]
        right = [float(i < RIGHT.get(name, 0.3) * ITEMS) for i in range(ITEMS)]
        cell |= {
            "name": name,
            "key": f"{name}/base-1e+12-seed0",
            "preset": None,
            "architecture": architecture,
            "objective": objective,
            "budget": 1e12,
            "seed": 0,
            "parent": None,
            "curve": [],
            "losses": [],
            "masks": [],
            "settings": {"model": {"position_encoding": positions}},
        }
        cell["heldout"] = {
            "continuation_bits_per_byte": bits,
            "continuation_interval": [bits - 0.01, bits + 0.01],
            "paired": {
                "documents": list(range(TEXTS)),
                "sizes": [20.0] * TEXTS,
                "amounts": amounts,
            },
            "comparable": objective != "masked_lm",
            "items": {"continuation": TEXTS},
            "tasks": {
                "kind": {
                    "accuracy": sum(right) / ITEMS,
                    "interval": [sum(right) / ITEMS - 0.05, sum(right) / ITEMS + 0.05],
                    "items": ITEMS,
                    "chance": 0.25,
                    "right": right,
                }
            },
        }
        made.append(cell)
    return found | {"cells": made, "tuning": []}


def _spectrum(effective: float) -> Spectrum:
    one = estimate(effective)
    return Spectrum(
        numerical_rank={"1e-06": one},
        stable_rank=one,
        effective_rank=one,
        log10_smallest_over_largest=estimate(-5.0),
    )


def _block(effective: float, queries: int, lost: float) -> Block:
    of = Attention(
        matrix=_spectrum(effective), without_mean_row=_spectrum(effective), entropy=estimate(0.5)
    )
    return Block(
        queries=queries,
        keys=queries,
        trained=of,
        layers=[of, of],
        heads=[[of], [of]],
        masks={},
        lost_by_seeing_ahead=estimate(lost),
    )


def _ranks(name: str, effective: float) -> Ranks:
    stream = "encoder" if name in ("encdec", "masked") else "decoder"
    blocks = {stream: _block(effective, 64, 0.1), "decoder": _block(effective, 64, 0.1)}
    if name in ("gpt", "prefix"):
        blocks["decoder.prefix"] = _block(effective, 32, 0.1)
    return Ranks(blocks=blocks, residual={})


def _positions(share: float) -> Positions:
    layers = [
        Layer(distance=estimate(share * 20), of_chance=estimate(share, 0.02)) for _ in range(3)
    ]
    return Positions(streams={"decoder": Stream(places=60, chance=20.0, layers=layers)})


def probed() -> dict[str, Probed]:
    """Probes by which every argument holds."""
    difficulty = {
        name: Difficulty(
            nats_per_target=estimate(3.0 if name == "gpt" else 2.0),
            representation={
                "kind": Representation(
                    linear=estimate(0.6), nearest=estimate(0.5), chance=0.25, layer=1
                )
            },
            linear=estimate(0.7 if name == "gpt" else 0.5),
            nearest=estimate(0.5),
        )
        for name in RIGHT
    }
    learners = {
        name: Learner(error={"5": estimate(1.0), "40": estimate(error)}, ratio={})
        for name, error in (
            ("causal_decoder", 0.2),
            ("prefix_decoder", 0.4),
            ("encoder_decoder", 0.5),
            ("least_squares", 0.1),
        )
    }
    cells = {
        "rank": {name: _ranks(name, 0.6 if name == "gpt" else 0.4) for name in RIGHT},
        "difficulty": difficulty,
        "position": {
            "gpt-blind": _positions(0.1),
            "prefix-blind": _positions(1.0),
            "masked-blind": _positions(1.0),
        },
        "dialogue": {
            "gpt": Dialogue(tokens=48, flops={"recompute": [10, 20], "reuse": [10, 11]}),
            "prefix": Dialogue(
                tokens=48, flops={"recompute": [10, 20], "reuse": [10, 20], "turn_blocks": [10, 11]}
            ),
            "encdec": Dialogue(tokens=48, flops={"recompute": [12, 24], "reuse": [12, 24]}),
            "masked": Dialogue(tokens=48, flops={}),
        },
        "regression": {"all": Regressed(settings=Regression(), learners=learners)},
        "masks": {
            "all": Throughput(
                length=64,
                device="cpu",
                environment=Machine(),
                ours=["megaarch (cpu)"],
                of_kernels={
                    "megaarch (cpu)": {"bidirectional": estimate(1.0)},
                    "dense mask": {"bidirectional": estimate(0.5)},
                },
            )
        },
    }
    return {name: Probed(probe=name, rows=32, cells=of) for name, of in cells.items()}
