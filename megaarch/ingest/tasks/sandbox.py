"""Jinja whose templates reach no attribute, module or file, and end soon: each rendering has a bound on its
work, which is counted before it is done.

Text that a filter, method or operator makes is at most as long as the product of the two longest of its
texts, or as a width that it is given. Each name, attribute and item counts by its size where it is read, so
that every operator, output and literal around it has been counted.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set, Sized
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from megaarch.errors import UserError

WORK = 1 << 25  # of a rendering, in characters
STEP = 256  # what a call, a filter or a turn of a loop counts beside what it is given
ITEM = 32
# %*d and {:{}} take their width from an argument
WIDTH = re.compile(r"%[^a-zA-Z]*\*|\{[^{}]*\{|\d{7}")
DIGITS = re.compile(r"\d+")
SLOW = ("lipsum", "pprint", "striptags", "urlize", "wordwrap")  # not linear in what they are given


class _Context(Context):
    left = WORK

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise jinja2.TemplateError("it takes too much work: shorten its loops and texts")


class _Namespace(Namespace):
    """A namespace whose text is not that of all it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Counted(NodeTransformer):
    """Has everything that a template reads, and every turn of its loops, counted."""

    def visit_Name(self, node: Any) -> nodes.Expr:
        node = self.generic_visit(node)
        return _filtered(node, "counted") if node.ctx == "load" else node

    visit_Getattr = visit_Getitem = visit_Name

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "counted turns")
        return node

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("blocks are not for templates", node.lineno)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _counted(context: _Context, value: Any) -> Any:
    context.spend(_size(value))
    return value


@pass_context
def _counted_turns(context: _Context, values: Any) -> Any:
    if isinstance(values, Undefined) or not isinstance(values, Iterable):
        return values  # whose error jinja words
    if isinstance(values, Sized):
        context.spend(STEP * len(values))
        return values
    return _each(context, values)


def _each(context: _Context, values: Iterable) -> Iterator:
    for value in values:
        context.spend(STEP)
        yield value


def _size(value: Any) -> int:
    """Returns the characters of a text or of all that a collection holds; of a number, the time that its
    square takes."""
    if isinstance(value, str | bytes):
        return 1 + len(value)
    if isinstance(value, int):
        return 1 + (value.bit_length() // 64) ** 2
    if isinstance(value, Mapping):
        return _size([*value.keys(), *value.values()])
    if isinstance(value, list | tuple | Set):
        return ITEM * (1 + len(value)) + sum(map(_size, value))
    if isinstance(value, Sized) and not isinstance(value, Undefined):
        return ITEM * (1 + len(value))
    return ITEM


def _work(values: Iterable[Any], widths: Iterable[Any] = ()) -> int:
    """Returns a bound on what a function makes of these values. widths: those that, as numbers, may say
    how long its text is, or each line's."""
    values = list(values)
    *_, second, longest = 1, 1, *sorted(map(_size, values))
    texts = [value for value in values if isinstance(value, str)]
    lines = 1 + sum(text.count("\n") + text.count("\t") for text in texts)
    width = max((abs(n) for n in widths if isinstance(n, int)), default=0)
    return STEP + second * longest + lines * width


def _depth(value: Any) -> int:
    """Returns how deep collections are nested in a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _widths(text: Any) -> int:
    """Returns a bound on how much the widths of a format add. SecurityError for those that are not told."""
    if not isinstance(text, str):
        return 0
    if WIDTH.search(text):
        raise SecurityError("such a width is not for templates")
    return sum(map(int, DIGITS.findall(text)))


class Sandbox(ImmutableSandboxedEnvironment):
    """Works as jinja's own sandbox does, within WORK."""

    intercepted_binops = frozenset(["**", "*", "%"])
    context_class = _Context

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.globals |= {"zip": zip, "namespace": _Namespace}
        self.filters["choice"] = lambda values: values[0]  # promptsource draws one
        for name in SLOW:
            self.globals.pop(name, None)
            self.filters.pop(name, None)
        self.filters = {name: self._bounded(name, f) for name, f in self.filters.items()}
        self.filters |= {"counted": _counted, "counted turns": _counted_turns}

    def _bounded(self, name: str, function: Any) -> Any:
        """A filter that counts what it is given."""
        kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

        @pass_context
        def bounded(context: _Context, value: Any, *arguments: Any, **named: Any) -> Any:
            given = (*arguments, *named.values())
            if name == "format":
                context.spend(_widths(value))
            if name == "tojson":  # a line an item, each indented by its depth
                indent = max((abs(n) for n in given if isinstance(n, int)), default=0)
                context.spend(_size(value) * _depth(value) * indent)
            context.spend(_work((value, *given), () if name == "format" else given))
            first = {"context": context, "eval_context": context.eval_ctx, "environment": self}
            leading = (first[kind],) if kind else ()
            return function(*leading, value, *arguments, **named)

        return bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        both_numbers = all(isinstance(x, int | float) for x in (left, right))
        if operator == "**" or (operator == "*" and not both_numbers):
            raise SecurityError(f"the operator {operator} is not for templates")
        context.spend(_work((left, right)) + (0 if both_numbers else _widths(left)))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        made = super().wrap_str_format(value)
        if made is not None:
            _widths(value.__self__)
        return made

    def call(__self, __context, __object, *args: Any, **kwargs: Any) -> Any:
        given, owner = (*args, *kwargs.values()), getattr(__object, "__self__", None)
        widths = given if isinstance(owner, str | bytes | int) else ()  # as of str.center
        formatted = getattr(getattr(__object, "__wrapped__", None), "__self__", None)
        __context.spend(_work((owner, *given), widths) + _widths(formatted))
        return super().call(__context, __object, *args, **kwargs)


ENVIRONMENT = Sandbox(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@lru_cache(maxsize=1024)
def parsed(source: str) -> jinja2.Template:
    """Returns a template. jinja2.TemplateError for a text that is none."""
    return ENVIRONMENT.from_string(source)


def render(source: str, fields: Mapping[str, Any], most: int) -> str:
    """Returns the text that a template makes of a record. UserError for a template that does not parse,
    fails on this record, takes too long or makes more than `most` characters."""
    pieces, size = [], 0
    try:
        for piece in parsed(source).generate(fields):
            size += len(piece)
            if size > most:
                raise UserError(f"it makes more than {most:,} characters")
            pieces.append(piece)
    except UserError:
        raise
    except jinja2.TemplateError as error:
        raise UserError(error.message or type(error).__name__) from None
    except RecursionError:
        raise UserError(f"it is nested too deeply in {source[:60]!r}") from None
    except Exception as error:  # a template is a program, which may raise anything
        raise UserError(f"{error} in {source[:60]!r}") from None
    return "".join(pieces)
