"""The planner against published throughput: `python -m tools.planning.published` prints the tables
of docs/planning.md."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from megaarch import config
from megaarch.cli.options import Parser
from megaarch.config.schema import Settings
from megaarch.planner.hardware import Constants, gpu, hardware
from megaarch.planner.software_stacks import TRAFFIC, Software
from megaarch.planner.time import Cluster, step_seconds

FILE = Path(__file__).with_name("published.yaml")
UNITS = {"tokens": "tokens/s/GPU", "seconds": "s/step", "tflops": "TFLOP/s/GPU"}


@dataclass(frozen=True)
class Row:
    """One published run. values: its columns and what its table gives for all of them; settings by
    their dotted names. figure: in `unit`, as published."""

    gpu: str
    unit: str
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """What its table calls it; else its model and the tokens of its rows."""
        values = self.values
        return values.get("run") or f"{values['model']}, {values['model.sequence_length']}"

    @property
    def gpus(self) -> int:
        return self.values["gpus"]

    @property
    def figure(self) -> float:
        return self.values["figure"]

    @property
    def parameters(self) -> float | None:
        """Billions, as published for the model; None where its source does not say."""
        return self.values.get("parameters") or self._model.get("parameters")

    @property
    def _model(self) -> dict[str, Any]:
        return _read()["models"][self.values["model"]]

    @cached_property
    def settings(self) -> Settings:
        """The run as this project would state it. Data-parallel ranks are what the other axes leave;
        parameters are sharded over them, unless the row says one shard."""
        model = {k: v for k, v in self._model.items() if k != "parameters"}
        raw: dict[str, Any] = {"model": {"preset": "gpt", **model}}
        raw |= {"training": {"precision": "bf16"}, "parallel": {}}
        for path, value in self.values.items():
            if "." in path:
                config.set_path(raw, path, value)
        if "feed_forward_size" not in raw["model"]:
            raw["model"]["feed_forward_size"] = 4 * raw["model"]["hidden_size"]
        parallel, data = raw["parallel"], self.gpus
        for axis in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
            data //= parallel.get(axis, 1)
        whole = parallel.get("data_parallel_shard") == 1
        parallel["data_parallel_replicate" if whole else "data_parallel_shard"] = data
        if parallel.get("stages_per_rank", 1) > 1:
            parallel["schedule"] = "interleaved_1f1b"
        return config.resolve(raw, self.name)

    @property
    def software(self) -> Software:
        """The practices of the software that ran it."""
        given = _read()["practices"][self.values["practice"]]
        return replace(Software(), **given | {"traffic": TRAFFIC[given["traffic"]]})

    def planned(self, constants: Constants) -> float:
        """The planner's figure, in the row's unit, with these constants."""
        cluster = Cluster(gpu(self.gpu), gpus_per_node=8, constants=constants)
        seconds = step_seconds(self.settings, cluster, self.software).total
        tokens = self.settings.training.global_batch_size * self.settings.model.sequence_length
        if self.unit == "seconds":
            return seconds
        if self.unit == "tokens":
            return tokens / seconds / self.gpus
        return _narayanan_flops(self.settings, tokens) / seconds / self.gpus / 1e12

    @cached_property
    def predicted(self) -> float:
        """The planner's figure, in the row's unit."""
        return self.planned(hardware().constants)

    def off(self, figure: float) -> float:
        """By how much throughput of `figure` is off, as a share of the published one."""
        ratio = figure / self.figure
        return (1 / ratio if self.unit == "seconds" else ratio) - 1

    @property
    def error(self) -> float:
        """By how much the planned throughput is off, as a share of the published one."""
        return self.off(self.predicted)


@dataclass(frozen=True)
class Table:
    """Rows of one source. limit: how far off any may be. beyond: names of rows that are further off, for
    what the source does not tell. fitted: constants of hardware.yaml that were fitted to it."""

    title: str
    rows: tuple[Row, ...]
    limit: float
    beyond: tuple[str, ...]
    fitted: str


def _narayanan_flops(settings: Settings, tokens: int) -> float:
    """FLOPs of a step by formula (3) of Narayanan et al. 2021: dense attention, and the forward pass
    twice."""
    model = settings.model
    h, layers, s, v = model.hidden_size, model.layers, model.sequence_length, model.vocabulary_size
    return 96 * tokens * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))


@lru_cache
def _read() -> dict[str, Any]:
    return config.read_yaml(FILE)


@lru_cache
def tables() -> dict[str, Table]:
    """Every published table, by its name in published.yaml."""
    found = {}
    for name, given in _read()["tables"].items():
        shared, columns = given.get("settings", {}), given["columns"]
        values = [shared | dict(zip(columns, row, strict=True)) for row in given["rows"]]
        rows = tuple(Row(given["gpu"], given["unit"], each) for each in values)
        beyond = tuple(given.get("beyond", ()))
        found[name] = Table(given["title"], rows, given["limit"], beyond, given.get("fitted", ""))
    return found


SHARES = tuple(n / 100 for n in range(80, 101))  # of the product rate, that are tried


@lru_cache
def left_out() -> dict[str, tuple[float, float]]:
    """Maps each table to the share of the product rate that fits all the others best (least squares of what
    is not `beyond`), and to the largest error among its own rows at that share."""
    errors: dict[str, dict[float, list[float]]] = {}
    for name, table in tables().items():
        rows = [row for row in table.rows if row.name not in table.beyond]
        errors[name] = {
            share: [row.off(row.planned(constants)) for row in rows]
            for share in SHARES
            for constants in [hardware().constants.model_copy(update={"product": share})]
        }

    def square(name: str, share: float) -> float:
        return sum(error**2 for other in errors if other != name for error in errors[other][share])

    found = {}
    for name, each in errors.items():
        best = min(SHARES, key=lambda share: square(name, share))
        found[name] = best, max(each[best], key=abs)
    return found


def report() -> str:
    """Every table in short, and then every row beside what the planner says, as Markdown."""
    lines = [
        "| table | GPU | rows | fitted to it | mean off by | most off by | share fitted to the others "
        "| most off by then |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, table in tables().items():
        errors = [row.error for row in table.rows]
        mean = sum(map(abs, errors)) / len(errors)
        share, most = left_out()[name]
        lines.append(
            f"| {table.title} | {table.rows[0].gpu} | {len(errors)} | {table.fitted or '-'} "
            f"| {mean:.1%} | {max(errors, key=abs):+.1%} | {share:.2f} | {most:+.1%} |"
        )
    for table in tables().values():
        unit = UNITS[table.rows[0].unit]
        lines += [
            "",
            f"**{table.title}**, {unit}",
            "",
            "| run | GPUs | micro-batch | published | planner | throughput off by |",
            "|---|---|---|---|---|---|",
        ]
        for row in table.rows:
            size = row.settings.training.micro_batch_size
            lines.append(
                f"| {row.name} | {row.gpus} | {size} | {row.figure:g} | {row.predicted:.4g} "
                f"| {row.error:+.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    about = "Prints published throughput beside what the planner says, as Markdown."
    Parser("python -m tools.planning.published", description=about).parse_args()
    print(report())
