"""Tasks made of Python's own documentation, so that a whole method of tasks runs on a laptop.

An item belongs to the document that it is made of. Held-out items come from documents that every
split of the embedded corpus holds out, and their wrong answers from such documents too; items to
train on come from documents that none holds out.
"""

import ast
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from megaarch.errors import UserError
from megaarch.ingest import embedded_corpus, split

HELD_OUT = 0.1  # of the documents; data.held_out of a study may be no smaller
FARTHEST = 2 * HELD_OUT  # a split's threshold climbs at most so far (split.Places.choose)
CHOICES = 4
MOST = 8  # items of a document
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
WORD = re.compile(r"\b[a-z]{5,12}\b")

Item = dict[str, Any]
Pool = Sequence[str]  # possible answers of all documents of a side


@dataclass(frozen=True)
class Entry:
    """A class, function or method with a docstring. owner: the class of a method."""

    kind: str
    name: str
    owner: str
    parameters: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class Document:
    name: str
    sentences: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# what a document adds to the pool, and the items that are made of it, None where one cannot be
Recipe = tuple[
    Callable[[Document], Iterable[str]],
    Callable[[Document, Pool, random.Random], Iterator[Item | None]],
]


@cache
def items(task: str, held_out: bool) -> list[Item]:
    """Returns the items of a task of TASKS, documents mixed. UserError for an unknown name."""
    if task not in TASKS:
        raise UserError(f"the documentation has no task {task!r}: it has {', '.join(TASKS)}")
    answers, make = TASKS[task]
    chosen = documents(held_out)
    pool = sorted({answer for document in chosen for answer in answers(document)})
    found = []
    for document in chosen:
        made = make(document, pool, random.Random(f"{task} {document.name}"))
        found += islice(filter(None, made), MOST)
    random.Random(task).shuffle(found)
    return found


@cache
def documents(held_out: bool) -> tuple[Document, ...]:
    """The documents of one side of every split."""
    found = []
    for name, text in embedded_corpus.documents():
        place = split.place(split.digest(text))
        if place < HELD_OUT if held_out else place >= FARTHEST:
            entries = tuple(_entries(name)) if name.endswith(".py") else ()
            found.append(Document(name, tuple(_sentences(text)), entries))
    return tuple(found)


def _entries(name: str) -> Iterator[Entry]:
    tree = ast.parse((embedded_corpus.library() / name).read_bytes())
    owners = {
        id(inner): node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for inner in node.body
    }
    for node in embedded_corpus.statements(tree):
        if not isinstance(node, embedded_corpus.DOCUMENTED) or node.name.startswith("_"):
            continue
        lines = (ast.get_docstring(node) or "").strip().splitlines()
        summary = lines[0].strip() if lines else ""
        if not 15 <= len(summary) <= 90 or node.name.lower() in summary.lower():
            continue
        owner, parameters = owners.get(id(node), ""), ()
        if not isinstance(node, ast.ClassDef):
            names = (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
            parameters = tuple(name for name in names if name not in ("self", "cls"))
        kind = "class" if isinstance(node, ast.ClassDef) else "method" if owner else "function"
        yield Entry(kind, node.name, owner, parameters, summary)


def _sentences(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        for sentence in SENTENCE.split(words):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if 30 <= len(sentence) <= 120 and letters > 0.9 * len(sentence):
                yield sentence


def _question(
    draw: random.Random, right: str, pool: Pool, besides: Sequence[str] = (), **fields: Any
) -> Item | None:
    """An item with the right answer among wrong ones of the pool, none of them in `besides`; None
    where there are too few."""
    excluded = {right, *besides}
    drawn = draw.sample(pool, min(len(pool), CHOICES - 1 + len(excluded)))
    wrong = [answer for answer in drawn if answer not in excluded][: CHOICES - 1]
    if len(wrong) < CHOICES - 1:
        return None
    choices = [right, *wrong]
    draw.shuffle(choices)
    return fields | {"choices": choices, "label": choices.index(right)}


def _mixed(values: Sequence[Any], draw: random.Random) -> list[Any]:
    return draw.sample(values, len(values))


def _of_entries(
    right: Callable[[Entry], str], asked: Callable[[Entry], Item], kinds: Sequence[str]
) -> Recipe:
    """A task on entries of some kinds, whose wrong answers are those of other entries."""

    def of_kinds(document: Document) -> list[Entry]:
        return [entry for entry in document.entries if entry.kind in kinds]

    def make(document: Document, pool: Pool, draw: random.Random) -> Iterator[Item | None]:
        for entry in _mixed(of_kinds(document), draw):
            yield _question(draw, right(entry), pool, **asked(entry))

    return (lambda document: map(right, of_kinds(document))), make


def _signature_to_module(
    document: Document, pool: Pool, draw: random.Random
) -> Iterator[Item | None]:
    for entry in _mixed(document.entries, draw):
        if entry.kind == "function":
            call = f"{entry.name}({', '.join(entry.parameters)})"
            yield _question(draw, document.module, pool, call=call, summary=entry.summary)


def _parameter(document: Document, pool: Pool, draw: random.Random) -> Iterator[Item | None]:
    for entry in _mixed(document.entries, draw):
        if entry.parameters:
            asked = {"name": entry.name, "summary": entry.summary}
            right = draw.choice(entry.parameters)
            yield _question(draw, right, pool, besides=entry.parameters, **asked)


def _kind(document: Document, pool: Pool, draw: random.Random) -> Iterator[Item]:
    for kind in ("class", "function", "method"):
        entries = [entry for entry in document.entries if entry.kind == kind]
        for entry in draw.sample(entries, min(2, len(entries))):
            yield {"name": entry.name, "summary": entry.summary, "kind": kind}


def _neighbours(document: Document, draw: random.Random) -> list[tuple[str, str]]:
    return _mixed(list(zip(document.sentences, document.sentences[1:], strict=False)), draw)


def _next_sentence(document: Document, pool: Pool, draw: random.Random) -> Iterator[Item | None]:
    for first, second in _neighbours(document, draw):
        yield _question(draw, second, pool, besides=document.sentences, text=first)


def _follows(document: Document, pool: Pool, draw: random.Random) -> Iterator[Item]:
    for place, (first, second) in enumerate(_neighbours(document, draw)):
        answer = "no" if place % 2 else "yes"
        yield {
            "first": first,
            "second": second if answer == "yes" else draw.choice(pool),
            "answer": answer,
        }


def _source(document: Document, pool: Pool, draw: random.Random) -> Iterator[Item | None]:
    for sentence in _mixed(document.sentences, draw):
        yield _question(draw, document.module, pool, text=sentence)


def _words(document: Document) -> list[str]:
    return [word for sentence in document.sentences for word in WORD.findall(sentence)]


def _missing_word(document: Document, pool: Pool, draw: random.Random) -> Iterator[Item | None]:
    for sentence in _mixed(document.sentences, draw):
        if words := WORD.findall(sentence):
            right = draw.choice(words)
            text = re.sub(rf"\b{right}\b", "____", sentence, count=1)
            yield _question(draw, right, pool, besides=words, text=text)


def _module(document: Document) -> list[str]:
    return [document.module] if document.entries else []


EVERY_KIND = ("function", "method", "class")
TASKS: dict[str, Recipe] = {
    "name_to_summary": _of_entries(lambda e: e.summary, lambda e: {"name": e.name}, EVERY_KIND),
    "summary_to_name": _of_entries(lambda e: e.name, lambda e: {"summary": e.summary}, EVERY_KIND),
    "method_to_class": _of_entries(
        lambda e: e.owner, lambda e: {"name": e.name, "summary": e.summary}, ("method",)
    ),
    "signature_to_module": (_module, _signature_to_module),
    "parameter": (lambda document: (p for e in document.entries for p in e.parameters), _parameter),
    "kind": (lambda document: (), _kind),
    "next_sentence": (lambda document: document.sentences[1:], _next_sentence),
    "follows": (lambda document: document.sentences, _follows),
    "source": (lambda document: (document.module,), _source),
    "missing_word": (_words, _missing_word),
}
