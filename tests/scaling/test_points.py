"""Points of files and studies, and the command that reads them."""

import json

import numpy as np
import pytest

from megaarch.cli import main
from megaarch.errors import UserError
from megaarch.scaling import points
from megaarch.study.results import Results
from tests.scaling.planted import Documents, planted
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
    found = points.of(
        "p", [points.Run(*row) for row in ((1, 9, 1), (1, 2, 2), (2, 2, 3), (1, 5, 4))]
    )
    assert found.without_lowest_ratios(2).loss.tolist() == [1, 4]


ITEMS = ((3.0, 1.0, 3.0), (10.0, 20.0, 30.0))  # two of document 3


def run(*amounts, items=ITEMS):
    return points.Run(1e6, 1e8, 2.0, points.Items(*items, amounts))


def test_items_are_added_up_by_document():
    found = points.of("p", [run(1.0, 2.0, 4.0), run(2.0, 2.0, 2.0)])
    assert found.documents == 2
    assert found.sizes.tolist() == [20, 40] and found.amounts.tolist() == [[2, 5], [2, 4]]
    assert found.without_lowest_ratios(1).amounts.shape == (1, 2)


@pytest.mark.parametrize(
    "runs",
    [
        [run(1.0, 2.0, 4.0), points.Run(1e6, 1e8, 2.0)],  # of an earlier version
        [run(1.0, 2.0, 4.0), run(1.0, 2.0, 4.0, items=((1.0, 1.0, 3.0), ITEMS[1]))],
        [run(1.0, 2.0, 4.0, items=((1.0, 1.0, 1.0), ITEMS[1]))],  # one document
        [run(1.0, 0.0, 4.0)],
    ],
)
def test_documents_that_are_not_those_of_all_runs_are_not_drawn_again(runs):
    found = points.of("p", runs)
    assert found.documents is None
    assert found.redrawn_losses(3).tolist() == [[2.0] * len(runs)] * 3


def test_losses_are_those_of_drawn_documents():
    """Of two documents a draw holds both, or one twice."""
    sizes, rows = np.array([20.0, 40.0]), np.array([[2.0, 5.0], [2.0, 4.0], [1.0, 9.0]])
    column = np.full(3, 1e6)
    found = points.Points("p", column, column, rows.sum(1) / 60, sizes, rows).redrawn_losses(400)
    kinds, often = np.unique(found.round(9), axis=0, return_counts=True)
    wanted = np.array([rows.sum(1) / 60, rows[:, 0] / 20, rows[:, 1] / 40])
    np.testing.assert_allclose(kinds, wanted[np.lexsort(wanted.T[::-1])])
    assert sorted(often)[2] > 160 and sorted(often)[0] > 70, "half of the draws, and a quarter each"


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


def test_points_of_a_study_know_their_documents():
    raw = panel_results()
    items = dict(zip(("documents", "sizes"), map(list, ITEMS), strict=True))
    for cell in raw["cells"]:
        cell["heldout"]["paired"] = items | {"amounts": [1.0, 2.0, 4.0]}
    raw["cells"][0]["heldout"]["paired"]["amounts"] = [1.0]  # a damaged file
    first, *others = points.of_study(Results.of(raw)).values()
    assert first.documents is None and {of.documents for of in others} == {2}


def test_the_command_says_whether_documents_are_drawn_again(tmp_path, capsys):
    held = Documents.drawn(0)
    of = planted(0.01, documents=held)
    [cell] = (c for c in panel_results()["cells"] if c["name"] == "gpt")
    cells = []
    for size, flops, loss, amounts in zip(
        of.parameters, of.flops, of.loss, of.amounts, strict=True
    ):
        items = {"documents": list(range(36)), "sizes": held.sizes.tolist()}
        paired = items | {"amounts": amounts.tolist()}
        heldout = cell["heldout"] | {"continuation_bits_per_byte": loss, "paired": paired}
        cells.append(cell | {"parameters": size, "flops": flops, "heldout": heldout})
    (tmp_path / "results.json").write_text(json.dumps(panel_results() | {"cells": cells}))
    path = write(tmp_path / "points.csv", of)
    for arguments, known in (([str(tmp_path)], True), (["--points", str(path)], False)):
        assert main(["fit", *arguments, "--resamples", "50"]) == 0
        text = capsys.readouterr().out
        assert ("leave out the choice of held-out documents" in text) is not known
        assert main(["fit", *arguments, "--resamples", "50", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["documents"] == (36 if known else None)


def test_the_command_prints_the_law_and_compares_architectures(tmp_path, capsys):
    path = write(tmp_path / "one.csv", planted(0.01))
    arguments = ["fit", "--points", str(path), "--resamples", "50", "--leave-out", "2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"] == 40
    for name in ("A", "B", "E", "alpha", "beta"):
        low, high = found["intervals"][name]
        assert low < found[name] < high
    assert [best["extrapolated"] for best in found["allocation"]] == [False, False]
    assert main(arguments) == 0
    assert "isoFLOP" in (text := capsys.readouterr().out) and "extrapolated" not in text
    columns = "parameters,training_flops,loss,architecture"
    both = write(tmp_path / "a.csv", planted(0.01), columns, ",gpt").read_text()
    second = write(tmp_path / "b.csv", planted(0.01, 1), columns, ",t5").read_text()
    path.write_text(both + second.split("\n", 1)[1])
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["architectures"]) == {"gpt", "t5"}
    [pair] = found["comparisons"]
    assert {pair["first"], pair["second"]} == {"gpt", "t5"} and pair["sentence"]
    assert pair["documents"] is False


def test_an_architecture_whose_points_decide_no_law_leaves_the_others_theirs(tmp_path, capsys):
    """As a cell that is not finished at all sizes."""
    columns = "parameters,training_flops,loss,architecture"
    path = write(tmp_path / "a.csv", planted(0.01), columns, ",gpt")
    path.write_text(path.read_text() + "1e8,1e19,3.0,t5\n")
    assert main(["fit", "--points", str(path), "--resamples", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["architectures"]) == ["gpt"]
    assert err.startswith("t5: 1 points do not decide the five parameters")
    path.write_text(columns + "\n1e8,1e19,3.0,t5\n1e8,1e19,3.0,gpt\n")
    assert main(["fit", "--points", str(path)]) == 2
    assert "t5: 1 points" in (err := capsys.readouterr().err) and "gpt: 1 points" in err


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
