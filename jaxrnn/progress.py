"""How far something long has come: told by whoever does it, and shown by whoever listens. Nobody need listen."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Listener = Callable[[str, int, int], Any]
"""Gets what is being done, how many steps of it are done, and of how many; 0 where that isn't known."""

_listeners: list[Listener] = []


def told(doing: str, done: int = 0, total: int = 0) -> None:
    """Tells those who listen: in a loop once a step, of what has no steps once."""
    for listener in _listeners:
        listener(doing, done, total)


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Has a listener told of everything that is done meanwhile, in this process.

    >>> with heard_by(print):
    ...     told('replaying', 3, 40)
    replaying 3 40
    >>> told('replaying', 4, 40)
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
