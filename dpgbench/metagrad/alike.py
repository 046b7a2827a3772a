"""Which pieces of work cost the same, for who counts FLOPs: the engine names them, and one of each kind is enough to count.

Counting goes through Python at every operation. Of a run of 32 small steps it took four times as long as computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

Result = TypeVar("Result")


class Tally(Protocol):
    """What is told of each piece of work; it does the work and returns what the work returns."""

    def __call__(self, kind: Hashable, work: Callable[[], Result]) -> Result: ...


_tally: ContextVar[Tally | None] = ContextVar("who is told of work that is alike", default=None)


def alike(kind: Hashable, work: Callable[[], Result]) -> Result:
    """What `work` returns. Within one call of the engine, work of one kind computes the same products where padding is computed."""
    tally = _tally.get()
    return work() if tally is None else tally(kind, work)


@contextmanager
def told(tally: Tally | None) -> Iterator[None]:
    """Inside, `alike` goes through `tally`; with None it just works."""
    before = _tally.set(tally)
    try:
        yield
    finally:
        _tally.reset(before)
