"""What is being computed right now, for whoever wants to show it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[str, bool], None]] = []


def anyone() -> bool:
    """Whether somebody listens."""
    return bool(_listeners)


def tell(name: str, new: bool) -> None:
    """A program of that name begins; `new`: it has to be compiled, or read from disk, before."""
    for listener in _listeners:
        listener(name, new)


@contextlib.contextmanager
def listening(listener: Callable[[str, bool], None]) -> Iterator[None]:
    """`listener(name, new)` is called for every program that begins meanwhile, in whatever thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
