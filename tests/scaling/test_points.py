"""Points of files and studies, and the command that reads them."""

import json

import numpy as np
import pytest

from megaarch.cli import main
from megaarch.errors import UserError
from megaarch.scaling import points
from megaarch.study.results import Results
from tests.scaling.planted import planted
from tests.study.example_results import panel_results


def write(path, found, columns="parameters,training_flops,loss", extra=""):
    rows = zip(found.parameters, found.flops, found.loss, strict=True)
    lines = [columns, *(f"{n},{c},{loss}{extra}" for n, c, loss in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_flops_become_tokens(tmp_path):
    wanted = planted(0.01)
    [found] = points.read(write(tmp_path / "mine.csv", wanted)).values()
    assert found.name == "mine"
    np.testing.assert_allclose(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.flops, wanted.flops)


def test_the_points_of_the_fewest_tokens_a_parameter_are_left_out():
    found = points.of("p", [(1, 9, 1), (1, 2, 2), (2, 2, 3), (1, 5, 4)])
    assert found.without_lowest_ratios(2).loss.tolist() == [1, 4]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("parameters,loss\n1,2\n", "no column training_flops"),
        ("", "no column parameters"),
        ("parameters,tokens,loss\n", "has no points"),
        ("parameters,tokens,loss\n1,2,x\n", "line 2: loss is 'x', which is no positive number"),
        ("parameters,tokens,loss\n1,2,3\n-1,2,3\n", "line 3: parameters is '-1'"),
        ("parameters,tokens,loss\n1,2\n", "line 2: loss is None"),
        ("parameters,tokens,loss\n1,inf,3\n", "tokens is 'inf'"),
        ("parameters,tokens,loss\n1,2," + "3" * 200_000, "is no CSV file: field larger than"),
    ],
)
def test_a_file_that_holds_something_else_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        points.read(path)


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_a_file_of_a_spreadsheet_is_read(tmp_path, end):
    path = tmp_path / "points.csv"
    path.write_bytes(end.join(["\ufeffparameters,tokens,loss", "1,2,3", ""]).encode())
    assert points.read(path)["points"].loss.tolist() == [3]


def test_a_name_is_printed_as_it_is(tmp_path, capsys):
    columns = "parameters,training_flops,loss,architecture"
    path = write(tmp_path / "a.csv", planted(0.01), columns, ",[/bold]x[red]")
    assert main(["fit", "--points", str(path), "--resamples", "5"]) == 0
    assert "[/bold]x[red]: L(N, D)" in capsys.readouterr().out


def test_points_of_a_study_are_its_comparable_cells_that_read_text():
    raw = panel_results()
    raw["cells"][0] |= {"adaptation": 1e12}
    raw["cells"][1] |= {"objective": "supervised"}
    raw["cells"][2] |= {"parent": "another", "inherited_flops": 1e12}
    raw["cells"][3] |= {"parent": "another", "inherited_flops": 1e12}
    raw["cells"][3]["settings"] = {"training": {"start_optimizer": True}}
    results = Results.of(raw)
    found = points.of_study(results)
    alike = [c for c in results.cells[3:] if c.heldout.comparable]
    assert set(found) == {c.name for c in alike}
    for name, of in found.items():
        cells = [c for c in alike if c.name == name]
        assert of.loss.tolist() == [c.heldout.continuation_bits_per_byte for c in cells]
        np.testing.assert_allclose(of.flops, [c.flops + (c.inherited_flops or 0) for c in cells])


def test_the_command_prints_the_law_and_compares_architectures(tmp_path, capsys):
    path = write(tmp_path / "one.csv", planted(0.01))
    arguments = ["fit", "--points", str(path), "--resamples", "50", "--leave-out", "2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"] == 40
    for name in ("A", "B", "E", "alpha", "beta"):
        low, high = found["intervals"][name]
        assert low < found[name] < high
    assert main(arguments) == 0
    assert "isoFLOP" in capsys.readouterr().out
    columns = "parameters,training_flops,loss,architecture"
    both = write(tmp_path / "a.csv", planted(0.01), columns, ",gpt").read_text()
    second = write(tmp_path / "b.csv", planted(0.01, 1), columns, ",t5").read_text()
    path.write_text(both + second.split("\n", 1)[1])
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["architectures"]) == {"gpt", "t5"}
    [pair] = found["comparisons"]
    assert {pair["first"], pair["second"]} == {"gpt", "t5"} and pair["sentence"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "give a study's folder, or --points"),
        (["--points", "x.csv", "--resamples", "1"], "--resamples 1: give 2 to"),
        (["nowhere"], "results.json does not exist"),
        (["--points", "nowhere.csv"], "nowhere.csv"),
        (["--points", "x.csv", "--leave-out", "-1"], "--leave-out -1"),
        (["--points", "/"], "/: Is a directory"),
    ],
)
def test_a_command_that_cannot_be_run_is_one_sentence(arguments, sentence, capsys):
    assert main(["fit", *arguments]) == 2
    assert sentence in capsys.readouterr().err
