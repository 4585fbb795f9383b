"""The planner's one set of constants against published throughput."""

from pathlib import Path

import pytest

from megaarch.model.parameter_count import parameter_count
from megaarch.planner.hardware import hardware
from tools.planning.published import left_out, report, tables

ROWS = [(name, row) for name, table in tables().items() for row in table.rows]
IDS = [f"{name}: {row.name}, {row.gpus} GPUs" for name, row in ROWS]
H100 = ("torchtitan-2024", "torchtitan-2025", "torchao-2025", "trainy-2025", "nemo-2024")


def test_the_tables_that_must_hold_are_there_with_their_limits():
    limits = {name: table.limit for name, table in tables().items()}
    assert limits["megatron-2021"] == 0.06 and limits["megatron-2021-sweep"] == 0.15
    assert all(limits[name] == 0.1 for name in H100)
    assert max(limits.values()) == 0.15
    known = {(row.values["model"], row.gpus) for name, row in ROWS if name == "torchtitan-2024"}
    assert known == {
        ("llama3-8b", 8),
        ("llama3-8b", 128),
        ("llama3-70b", 256),
        ("llama3-405b", 512),
    }


@pytest.mark.parametrize(("name", "row"), ROWS, ids=IDS)
def test_each_published_row_within_the_limit_of_its_table(name, row):
    table = tables()[name]
    inside = abs(row.error) < table.limit
    assert inside != (row.name in table.beyond), f"{row.error:+.1%}"


def test_rows_beyond_the_limit_are_of_held_out_tables_and_few():
    found = [row.name for name, row in ROWS if row.name in tables()[name].beyond]
    assert len(found) <= 2
    assert not any(table.beyond and table.fitted for table in tables().values())


def speed(row, figure):
    """Tokens a second and GPU, or another unit of throughput; the same for the rows of a table."""
    if row.unit != "seconds":
        return figure
    return row.settings.training.global_batch_size / row.gpus / figure


def pairs(rows, share, *, across):
    """(faster, slower) by published figures that differ by more than `share`. across: models too."""
    return [
        (a, b)
        for a in rows
        for b in rows
        if (across or a.settings.model == b.settings.model)
        and speed(a, a.figure) > (1 + share) * speed(b, b.figure)
    ]


def test_of_two_runs_of_a_model_the_planner_prefers_the_one_that_was_faster():
    """Where they differ by more than 2.5%: two runs of one layout do by as much. TFLOP/s compare over
    models too."""
    found = [pair for table in tables().values() for pair in pairs(table.rows, 0.025, across=False)]
    found += pairs(tables()["megatron-2021-sweep"].rows, 0.1, across=True)
    assert len(found) > 70
    for faster, slower in found:
        said = speed(faster, faster.predicted), speed(slower, slower.predicted)
        assert said[0] > said[1], (faster.name, faster.gpus, slower.name, slower.gpus)


COUNTED = [(name, row) for name, row in ROWS if row.parameters is not None]


@pytest.mark.parametrize("row", [row for _, row in COUNTED], ids=lambda row: row.name)
def test_published_models_have_the_stated_parameters(row):
    count = parameter_count(row.settings.model) / 1e9
    assert abs(count - row.parameters) < 0.05 + row.parameters / 2000, f"{count} B"


def test_each_table_left_out_the_others_say_the_same_and_it_holds():
    used = hardware().constants.product
    for name, (share, most) in left_out().items():
        assert abs(share - used) < 0.025, name
        assert abs(most) < tables()[name].limit + 0.02, name


def test_what_was_fitted_is_stated_and_is_few():
    fitted = [
        constant.strip()
        for table in tables().values()
        if table.fitted
        for constant in table.fitted.partition(", to ")[0].split(",")
    ]
    assert len(fitted) <= 6 and set(fitted) <= set(type(hardware().constants).model_fields)


def test_the_page_holds_the_tables_that_its_command_prints():
    page = Path(__file__).parents[2] / "docs" / "planning.md"
    assert report() in page.read_text(), "run python -m tools.planning.published"
