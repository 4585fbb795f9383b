"""Caches of functions of settings."""

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def cached(most: int) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Returns a decorator that keeps the `most` newest results of a function, by its arguments.

    It is functools.lru_cache with the types of the function: of that one the stub checks no argument,
    and takes no pydantic model for hashable, which settings are, for they are frozen.
    """
    return lru_cache(maxsize=most)  # pyright: ignore[reportReturnType]  # as the docstring says
