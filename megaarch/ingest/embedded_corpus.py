"""The embedded corpus: Python's own documentation, English prose that ships with every Python.

One document a language topic (`pydoc_data.topics`) and one a standard library module: its
docstrings, read from the source and never by importing it. About 2.2 MB in some 500 documents.
"""

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# encodings: 120 tables that share one docstring.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
LEAST_CHARACTERS = 200
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def documents() -> tuple[tuple[str, str], ...]:
    """Every document with its name (a topic's, or the path of a module within the library), in an order and
    with a text that depend on the Python version alone."""
    from pydoc_data.topics import topics

    files = (path.relative_to(library()) for path in library().rglob("*.py"))
    names = sorted(path.as_posix() for path in files if not SKIPPED.intersection(path.parts))
    found = [(name, topics[name]) for name in sorted(topics)]
    found += [(name, _docstrings(library() / name)) for name in names]
    found = [(name, text.encode(errors="replace").decode()) for name, text in found]
    return tuple((name, text) for name, text in found if len(text) >= LEAST_CHARACTERS)


def library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _docstrings(path: Path) -> str:
    """The docstrings of a source file, in the order of its text; "" if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""
    found = [ast.get_docstring(tree)]
    found += [ast.get_docstring(node) for node in statements(tree) if isinstance(node, DOCUMENTED)]
    return "\n\n".join(text for text in found if text)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below `node`, in the order of the source; expressions are not entered."""
    for block in ("body", "handlers", "cases", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield child
            yield from statements(child)
