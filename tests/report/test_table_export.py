"""The table as text, CSV and LaTeX."""

import re
from csv import DictReader
from io import StringIO

import pytest

from megaarch import report
from tests.study.example_results import (
    CELLS,
    adapted_results,
    cell_at,
    clean_results,
    example_results,
    scaling_results,
)


@pytest.mark.parametrize("make", [example_results, scaling_results, clean_results, adapted_results])
def test_text_stays_within_80_columns_of_ascii(make):
    results = make()
    results["cells"][0]["flops"] *= 1.4  # a warning that names a power of ten
    page_text = report.text(results)
    assert "Unequal compute at " in page_text and "?" not in page_text
    assert max(map(len, page_text.splitlines())) <= 80
    assert page_text.isascii()


def test_text_breaks_no_line_within_a_power_of_ten():
    """Wherever the line ends: the names before it have one letter more each time."""
    for letters in range(1, 40):
        parent = cell_at("gpt", 2.5, 2.4, 2.6, key="k" * letters)
        child = cell_at("child", 2.0, 1.9, 2.1, parent="k" * letters, inherited_flops=3e13)
        page_text = report.text(example_results([parent, child]))
        assert "so 3.00e13 FLOPs spent" in " ".join(page_text.split())


def test_text_keeps_80_columns_with_long_names_and_large_numbers():
    cells = [
        cell_at(f"encoder_decoder_span_corruption_{end}", 2.0, 1.9, 2.1, preset=None)
        for end in ("one", "two")
    ]
    cells[0] |= {"tokens_per_second": 12_345_678.9, "parameters": 11_003_000_000, "flops": 1e22}
    page_text = report.text(example_results(cells))
    assert max(map(len, page_text.splitlines())) <= 80
    assert "tion_one" in page_text and "tion_two" in page_text


def test_a_value_after_adaptation_is_never_cut_in_its_digits():
    results = adapted_results()
    for cell in results["cells"]:
        gain = -0.128 if "adaptation" in cell else -0.007
        cell["heldout"] |= {"prefix_gain": gain, "prefix_gain_interval": [gain, gain]}
        cell["heldout"]["continuation_bits_per_byte"] += 10
    lines = report.text(results).splitlines()
    rows = [line for line in lines if "-adapted" in line and "->" in line]
    assert rows and max(map(len, lines)) <= 80
    for row in rows:
        assert "-0.01 -> -0.13 " in row
        assert re.search(r" 1\d\.\d\d -> 1\d\.\d\d[~ ]", row)


def test_text_is_sorted_by_bits_per_byte():
    lines = report.text(example_results()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    values = []
    for line in lines[start + 1 :]:
        if not line:
            break
        values.append(float(line.split()[1].rstrip("~")))
    assert len(values) == len(CELLS) - 1
    assert values == sorted(values)


def test_text_and_csv_say_how_many_items_the_values_rest_on():
    results = example_results()
    assert "held-out items: 256 continuation, 256 choice, 128 middle" in report.text(results)
    rows = {row["name"]: row for row in DictReader(StringIO(report.csv(results)))}
    kinds = [f"{kind}_items" for kind in ("continuation", "choice", "middle")]
    assert [rows["t5"][kind] for kind in kinds] == ["256", "256", "128"]
    assert rows["gpt"]["middle_items"] == "0"
    results["cells"][0]["heldout"]["items"] = {"continuation": 90}
    assert "held-out items: 90-256 continuation," in report.text(results)


def test_csv_parses_back_to_the_numbers():
    results = example_results()
    rows = {row["name"]: row for row in DictReader(StringIO(report.csv(results)))}
    assert list(rows) == [cell["name"] for cell in results["cells"]]
    for cell in results["cells"]:
        row, heldout = rows[cell["name"]], cell["heldout"]
        assert float(row["flops"]) == cell["flops"]
        assert float(row["continuation_bits_per_byte"]) == heldout["continuation_bits_per_byte"]
        assert float(row["choice_accuracy_high"]) == heldout["choice_interval"][1]
        assert row["comparable"] == str(heldout["comparable"])
    assert rows["gpt"]["middle_bits_per_byte"] == ""


def test_latex_is_balanced_and_escaped():
    odd = cell_at("50%_of_$5 & #1 {x}", 2.0, 1.9, 2.1)
    source = report.latex(example_results([*example_results()["cells"], odd]))
    bare = re.sub(r"\\[&%$#_{}\\]", "", source)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "_" not in bare
    for name in ("table", "tabular"):
        assert source.count(rf"\begin{{{name}}}") == source.count(rf"\end{{{name}}}") == 1
    rules = [source.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert rules == sorted(rules)
    body = source[rules[1] : rules[2]]
    rows = [line for line in body.splitlines() if re.search(r"(?<!\\)&", line)]
    assert len(rows) == len(CELLS) + 1
    assert all(len(re.findall(r"(?<!\\)&", line)) == 6 for line in rows)
    assert all(line.endswith(r"\\") for line in rows)
    assert r"prefix\_lm" in source and r"bert$^{\dagger}$" in source


def test_latex_has_no_superscript_digits():
    results = example_results()
    results["cells"][0]["flops"] *= 2
    text = report.latex(results)
    assert "Unequal compute" in text and text.isascii()
