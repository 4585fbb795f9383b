"""The planner against published throughput: `python -m megaarch.planner.published` prints the table
of docs/planning.md."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megaarch import config
from megaarch.planner.hardware import gpu
from megaarch.planner.time import Cluster, step_seconds
from megaarch.planner.work import Practice
from megaarch.settings import Settings

FILE = Path(__file__).with_name("published.yaml")
SEQUENCE, VOCABULARY = 2048, 51200
# Megatron-LM of 2021: tokens between products on every tensor rank, scores in memory, gradients
# reduced in fp16, logits kept
MEGATRON_2021 = Practice(
    sequence_parallel=False, fused_attention=False, logits_again=False, gradient_bytes=2
)


@dataclass(frozen=True)
class Row:
    """One published run. parameters: billions. tflops: per GPU, by the paper's own formula."""

    name: str
    parameters: float
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    stages: int
    micro_batch: int
    gpus: int
    batch: int
    tflops: float

    def settings(self, *, sharded: bool) -> Settings:
        """The run as this project would state it. sharded: parameters over data-parallel ranks."""
        data = self.gpus // (self.tensor * self.pipeline)
        return config.resolve(
            {
                "model": {
                    "preset": "gpt",
                    "layers": self.layers,
                    "heads": self.heads,
                    "hidden_size": self.hidden,
                    "feed_forward_size": 4 * self.hidden,
                    "vocabulary_size": VOCABULARY,
                    "sequence_length": SEQUENCE,
                    "normalization": "layernorm",
                    "position_encoding": "learned",
                    "activation": "gelu",
                    "bias": True,
                },
                "training": {
                    "micro_batch_size": self.micro_batch,
                    "global_batch_size": self.batch,
                    "precision": "bf16",
                },
                "parallel": {
                    "tensor_parallel": self.tensor,
                    "pipeline_parallel": self.pipeline,
                    "stages_per_rank": self.stages,
                    "schedule": "interleaved_1f1b" if self.stages > 1 else "1f1b",
                    "data_parallel_shard": data if sharded else 1,
                    "data_parallel_replicate": 1 if sharded else data,
                    "reshard_after_forward": sharded,
                    "recompute": "full",
                },
            },
            self.name,
        )

    @property
    def paper_flops(self) -> float:
        """FLOPs of a step by the paper's formula (3): dense attention, and the forward pass twice."""
        h, layers = self.hidden, self.layers
        tail = 1 + SEQUENCE / (6 * h) + VOCABULARY / (16 * layers * h)
        return 96 * self.batch * SEQUENCE * layers * h * h * tail

    def predicted(self, *, sharded: bool) -> float:
        """TFLOP/s per GPU, by the paper's formula and the planner's seconds."""
        cluster = Cluster(gpu("a100"), gpus_per_node=8)
        seconds = step_seconds(self.settings(sharded=sharded), cluster, MEGATRON_2021).total
        return self.paper_flops / seconds / self.gpus / 1e12


def rows(table: str) -> list[Row]:
    """Of `table_1`, `table_2_sharded` or `table_2_pipelined`."""
    return [Row(*row) for row in config.read_yaml(FILE)[table]]


def report() -> str:
    """Every published row beside what the planner says, as Markdown."""
    lines = [
        "| run | GPUs | micro-batch | published | planner | off by |",
        "|---|---|---|---|---|---|",
    ]
    for table in ("table_1", "table_2_sharded", "table_2_pipelined"):
        for row in rows(table):
            said = row.predicted(sharded=table == "table_2_sharded")
            lines.append(
                f"| {row.name} | {row.gpus} | {row.micro_batch} | {row.tflops:.0f} | {said:.1f} | "
                f"{said / row.tflops - 1:+.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    about = "Prints published throughput beside what the planner says, as Markdown."
    argparse.ArgumentParser("python -m megaarch.planner.published", description=about).parse_args()
    print(report())
