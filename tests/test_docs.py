"""The pages name files that exist (docs/log.md is left out: it tells of what has gone, too), and no test file is
also a library."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"})
OTHERS = {"interface.py", "sdp_utils.cpp"}  # files of libraries
PAGES.remove(ROOT / "docs" / "log.md")
# made by a command, a site's own, or the reader's
MADE = {
    "DATE",
    "report.html",
    "results.json",
    "metrics.jsonl",
    "site.sh",
    "build/",
    "runs/",
    ".venv/",
}
FILES = {
    str(path.relative_to(ROOT))
    for top in ROOT.iterdir()
    if not top.name.startswith(".") or top.name == ".ci"
    for path in (top, *(top.rglob("*") if top.is_dir() else ()))
    if "__pycache__" not in path.parts and ".venv" not in str(path)
}
TOPS = {name.partition("/")[0] for name in FILES} - {"runs", "build"}


def named(text: str) -> set[str]:
    """The paths in a page: targets of links, words in backticks, and words of indented commands
    that begin with a folder of the repository or end like a file of its code."""
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    words = {word.strip("'\",;:()") for line in code for word in line.split()}
    return links | {
        word
        for word in words
        if re.fullmatch(r"[\w./*-]+", word)
        and (
            word.partition("/")[0] in TOPS
            if "/" in word
            else re.search(r"\w\.(py|sh|md|cpp)$", word)
        )
    }


def exists(word: str, page: Path) -> bool:
    """A path stands below the repository, the page's folder or the package; a bare name, anywhere."""
    word = word.rstrip("/.")
    local = (page.parent / word).resolve()
    if local.exists() or word in FILES or f"megaarch/{word}" in FILES:
        return True
    if "*" in word:
        return any(fnmatch(file, word) for file in FILES)
    return "/" not in word and any(file.endswith(f"/{word}") for file in FILES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_on_a_page_exists(page):
    there = [
        word for word in named(page.read_text()) - OTHERS if not any(made in word for made in MADE)
    ]
    missing = sorted(word for word in there if not exists(word, page))
    assert not missing


def test_pages_name_paths():
    """Otherwise the test above would look at nothing."""
    assert sum(len(named(page.read_text()) - OTHERS) for page in PAGES) > 100


def imported_tests(source: str) -> set[str]:
    """The test files that a file imports, or takes names of."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.rpartition(".")[2].startswith("test_")}


def test_no_file_imports_a_test_file():
    for form in (
        "from tests.x.test_y import z",
        "from tests.x import test_y",
        "import tests.x.test_y",
        "def f():\n    from .test_y import z",
        "from . import test_y",
    ):
        assert imported_tests(form), form
    assert not imported_tests("from tests.x.y import z\nimport tests.test_x.y")
    files = sorted(ROOT.glob("tests/**/*.py"))
    assert len(files) > 200
    found = [
        (file.relative_to(ROOT), name)
        for file in files
        for name in imported_tests(file.read_text())
    ]
    wrong = "".join(f"\n{file} imports {name}" for file, name in sorted(found))
    assert not wrong, f"move what is shared to a module without tests, beside the test file:{wrong}"
