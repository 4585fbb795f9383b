"""The report page in a real browser: no network, no error, every plot with its data."""

import importlib
import importlib.util
import os
import shutil

import pytest

from megaarch.report import write_page
from tests.study.example_results import CELLS, adapted_results, example_results, scaling_results

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
COMPARABLE = [name for name in CELLS if name != "bert"]
FILLS = [name for name in CELLS if name not in ("gpt", "prefix_lm")]
# panel -> (cells it draws, corners that each one's path has at least)
PANELS = {
    "heldout-flops": (COMPARABLE, 9),
    "heldout-time": (COMPARABLE, 9),
    "heldout-final": (COMPARABLE, 3),
    "heldout-apart": (["bert"], 9),
    "throughput-tokens": (list(CELLS), 4),
    "throughput-flops": (list(CELLS), 4),
    "choice": (list(CELLS), 3),
    "middle": (FILLS, 3),
    **{f"mask-{name}": ([name], 4) for name in CELLS},
    "loss-full_lm": (["gpt"], 150),
    "loss-prefix_lm": (["prefix_lm"], 150),
    "loss-unilm": (["unilm"], 150),
    "loss-span_corruption": (["t5"], 150),
    "loss-denoising": (["bart"], 150),
    "loss-masked_lm": (["bert"], 150),
    "loss-blank_infilling": (["glm"], 150),
    "loss-permutation_lm": (["xlnet"], 150),
}
MEASURE = """id => {
  const group = document.getElementById(id);
  if (!group) return null;
  const box = group.getBoundingClientRect();
  const corners = [...group.querySelectorAll("path")]
    .map(path => (path.getAttribute("d").match(/[MLC]/g) || []).length);
  const frame = group.ownerSVGElement.getBoundingClientRect();
  return {width: box.width, height: box.height, corners: Math.max(0, ...corners),
          inside: box.right > frame.left && box.left < frame.right && frame.width > 100};
}"""


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    reason = None
    if program is None:
        reason = f"none of {', '.join(BROWSERS)} is installed: the page cannot be looked at"
    elif importlib.util.find_spec("playwright") is None:
        reason = "playwright is not installed: the page cannot be looked at"
    if reason:
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    return {
        "demo": write_page(example_results(), directory / "demo.html"),
        "scaling": write_page(scaling_results(), directory / "scaling.html"),
        "adapted": write_page(adapted_results(), directory / "adapted.html"),
        "tasks": write_page(with_tasks(scaling_results()), directory / "tasks.html"),
    }


def with_tasks(found: dict) -> dict:
    """The results with scores of two tasks."""
    for cell in found["cells"]:
        score = {"accuracy": 0.5, "interval": [0.4, 0.6], "items": 60, "chance": 0.25}
        cell["heldout"]["tasks"] = {"first": score, "second": score}
    return found


def look(browser, path, width=1280, scheme="light"):
    """The loaded page, and what went wrong: requests to elsewhere, console messages, errors."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, wrong = context.new_page(), []
    tab.set_default_timeout(180_000)  # of a machine with much else to do

    def gate(route):
        if route.request.url.startswith(("file:", "data:")):
            return route.continue_()
        wrong.append(route.request.url)
        return route.abort()

    tab.route("**/*", gate)
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(path.as_uri())
    return tab, wrong


@pytest.mark.parametrize("name", ["demo", "scaling", "adapted"])
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_page_loads_alone_and_fits_the_screen(browser, pages, name, width, scheme):
    tab, wrong = look(browser, pages[name], width, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert wrong == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.context.close()


def test_every_plot_has_its_data(browser, pages):
    tab, wrong = look(browser, pages["demo"])
    drawn = tab.eval_on_selector_all("svg[data-panel]", "all => all.map(s => s.dataset.panel)")
    assert sorted(drawn) == sorted(PANELS)
    for panel, (cells, corners) in PANELS.items():
        for cell in cells:
            found = tab.evaluate(MEASURE, f"{panel}--{cell}")
            assert found, f"{panel} draws no {cell}"
            assert found["corners"] >= corners, (panel, cell, found)
            assert found["width"] > 3 and found["height"] > 1 and found["inside"], (panel, cell)
    assert wrong == []
    tab.context.close()


def test_iso_budget_curves_have_a_point_for_each_size(browser, pages):
    tab, _ = look(browser, pages["scaling"])
    for panel in ("scaling-1", "scaling-2"):
        for cell in ("gpt", "prefix_lm", "t5"):
            assert tab.evaluate(MEASURE, f"{panel}--{cell}")["corners"] >= 3
    tab.context.close()


def test_text_of_drawings_reads_in_both_schemes(browser, pages):
    """Every text in a drawing has a contrast of at least 4.5 against the page (WCAG 1.4.3)."""
    script = """() => {
      const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
      const light = colour => {
        const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const page = light(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll("svg[data-panel] text")].map(text => {
        const own = light(getComputedStyle(text).fill);
        return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05);
      });
    }"""
    for scheme in ("light", "dark"):
        tab, _ = look(browser, pages["demo"], scheme=scheme)
        contrasts = tab.evaluate(script)
        assert len(contrasts) > 100 and min(contrasts) >= 4.5, (scheme, min(contrasts))
        tab.context.close()


@pytest.mark.parametrize("name", ["demo", "tasks"])
def test_text_of_plots_is_large_enough_to_read(browser, pages, name):
    """In a study of several sizes, plots of the training loss and of tasks were drawn for a half of the page and
    shown at a quarter of it, in letters of 5 pixels."""
    script = """() => [...document.querySelectorAll("svg[data-panel]:not([data-panel^=mask]) text")].map(text => {
      const {a, b} = text.getScreenCTM();
      const panel = text.closest("svg[data-panel]").dataset.panel;
      return [Math.hypot(a, b) * parseFloat(getComputedStyle(text).fontSize), panel];
    })"""
    tab, _ = look(browser, pages[name])
    sizes = tab.evaluate(script)
    assert len(sizes) > 100 and min(sizes) >= [8.0, ""], min(sizes)
    tab.context.close()


def test_a_column_sorts_both_ways_and_missing_values_stay_last(browser, pages):
    tab, wrong = look(browser, pages["demo"])
    names = """() => [...document.querySelector("table.sortable").tBodies[0].rows]
        .map(row => row.cells[0].innerText.split("\\n")[0].replace("≈", "").trim())"""
    before = tab.evaluate(names)
    assert before[0] == "gpt" and len(before) == len(COMPARABLE)
    tab.click("table.sortable th:has-text('Tokens/s') button")
    assert tab.evaluate(names)[0] == "xlnet"
    tab.click("table.sortable th:has-text('Tokens/s') button")
    assert tab.evaluate(names)[0] == "t5"
    tab.click("table.sortable th:has-text('Middle') button")
    assert set(tab.evaluate(names)[-2:]) == {"gpt", "prefix_lm"}
    assert wrong == []
    tab.context.close()
