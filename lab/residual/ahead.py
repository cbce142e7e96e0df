"""Pieces of work of which some are begun before those before them are waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")

#: begins a piece of work; what it returns waits for the result
Begin = Callable[[], Callable[[], Result]]


def in_order(work: Iterable[Begin[Result]], depth: int) -> Iterator[Result]:
    """Results of all pieces in their order; `depth` more are begun before one is waited for.

    A piece that cannot be begun raises its error when it is its turn: what was begun before it is not lost.
    """
    begun: deque[Callable[[], Result]] = deque()
    failure: Exception | None = None
    for begin in work:
        try:
            begun.append(begin())
        except Exception as error:
            failure = error
            break
        if len(begun) > depth:
            yield begun.popleft()()
    while begun:
        yield begun.popleft()()
    if failure is not None:
        raise failure
