"""Batches of a loader that can be begun again: counted forward, or set to a place where the loader knows its place."""

import base64
import collections
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxrnn.types import Tree, UserError

KEPT = 256
"""Batches that are kept in memory: a replay asks for the same ones again and again."""

PLACES = 100
"""Batches from one remembered place of a loader to the next."""

AHEAD = 10 * PLACES
"""How many batches further a remembered place must be, to be worth going to."""


class Drawn:
    """The batch of each step, from a loader that gives the same batches each time that it is begun: a `batch_at`.

    Batches are drawn one after the other. For an earlier one the loader is begun again, or set back where it has
    `get_state` and `set_state`, as Grain's iterators have.

    Args:
        begin: makes the loader: anything that can be iterated over.

    >>> batch_at = jaxrnn.Drawn(lambda: iter([3, 1, 4, 1, 5]))
    >>> batch_at(2), batch_at(0), batch_at(4)
    (4, 3, 5)
    """

    def __init__(self, begin: Callable[[], Iterable[Any]]):
        self._begin = begin
        self._known: collections.OrderedDict[int, Tree] = collections.OrderedDict()
        self._states: dict[int, Any] = {}
        self._iterator: Any = None
        self._next = 0

    def __call__(self, step: int) -> Tree:
        """Raises UserError where the loader ended before."""
        if step not in self._known:
            self._go_to(step)
            while self._next <= step:
                self._draw(step)
        self._known.move_to_end(step)
        return self._known[step]

    def _draw(self, step: int) -> None:
        assert self._iterator is not None
        if self._next % PLACES == 0 and knows_its_place(self._iterator):
            self._states.setdefault(self._next, self._iterator.get_state())
        batch = next(self._iterator, self)
        if batch is self:
            raise UserError(
                f'batches: the loader ended after {self._next}, and the batch of step {step} is asked for'
            )
        self._known[self._next] = batch
        self._next += 1
        if len(self._known) > KEPT:
            self._known.popitem(last=False)

    def _go_to(self, step: int) -> None:
        """To a place at or before a step, if the loader isn't at one already, or is far before it."""
        place = max((at for at in self._states if at <= step), default=0)
        if self._iterator is None or step < self._next or place > self._next + AHEAD:
            self._iterator, self._next = iter(self._begin()), 0
            if place:
                self._iterator.set_state(self._states[place])
                self._next = place


def knows_its_place(iterator: Any) -> bool:
    """Whether it can say where it is, and be set there."""
    return callable(getattr(iterator, 'get_state', None)) and callable(getattr(iterator, 'set_state', None))


MOST_PLACE = 1_000_000
"""Bytes of a loader's place that are noted. One that has a larger one, as with many images to shuffle, is counted."""

LOADER = 'loader'
"""What a checkpoint's meta calls the place of the loader."""


class Counted:
    """An iterator that counts.

    Args:
        iterator: of batches.
        drawn: how many were drawn.
    """

    def __init__(self, iterator: Iterator[Any], drawn: int):
        self._iterator: Any = iterator
        self.drawn = drawn

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator)
        self.drawn += 1
        return batch

    def place_at(self, number: int) -> dict[str, Any]:
        """What is to be noted of its place, if that is before the batch of this number: not so of one drawn ahead."""
        if self.drawn != number or not knows_its_place(self._iterator):
            return {}
        place = self._iterator.get_state()
        if isinstance(place, bytes) and len(place) > MOST_PLACE:
            return {}
        if isinstance(place, bytes):
            return {LOADER: {'bytes': base64.b64encode(place).decode()}}
        try:
            return {LOADER: {'json': json.loads(json.dumps(place))}}
        except (TypeError, ValueError):  # then it is counted forward
            return {}


def unwritten(noted: Any) -> Any:
    """The place that `Counted.place_at` noted; None for what is none."""
    if not isinstance(noted, dict):
        return None
    if isinstance(noted.get('bytes'), str):
        try:
            return base64.b64decode(noted['bytes'], validate=True)
        except ValueError:
            return None
    return noted.get('json')


def after(
    source: Iterable[Any] | Callable[[], Iterable[Any]], taken: int, place: Any = None
) -> Iterator[Any]:
    """The iterator of a loader at its batch number `taken`: set to a place that it had said there, or drawn forward.

    Raises:
        UserError: the loader ends before.
    """
    drawn: Any = iter(source() if callable(source) and not hasattr(source, '__iter__') else source)
    if place is not None and knows_its_place(drawn):
        drawn.set_state(place)
        return drawn
    number = sum(1 for _ in itertools.islice(drawn, taken))
    if number < taken:
        raise UserError(
            f'batches: the loader ended after {number} batches, and the run has {taken} steps; give one that goes on, '
            'as itertools.chain.from_iterable(itertools.repeat(loader))'
        )
    return drawn
