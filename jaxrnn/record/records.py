"""The records of a run in memory: a column a field, and a row made of them when one is asked for.

A million rows of 30 fields are 250 MB so; as dictionaries they are ten gigabytes.
"""

import hashlib
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from jaxrnn.types import Series

Row = Mapping[str, Any]
"""A record on the host: `step`, then the scalars by name, `digest` as hex or absent."""

STEP = 'step'

MISSING = np.array(0x7FF8_0000_0000_07A2, np.uint64).view(np.float64)[()]
"""What stands in a column where a row lacks the field: a NaN, told from others by its bits, as R's NA_real_ is."""

ABSENT = object()
"""The same where a column isn't of floats."""

BLOCK = 4096
"""Rows that become columns at once."""


def is_missing(values: np.ndarray) -> np.ndarray:
    """Where a column has no value at all, bool [S]; not so where it has a NaN."""
    if values.dtype != np.float64:
        return np.zeros(values.shape, bool)
    # A column that is one number for all steps is a view without strides.
    return np.ascontiguousarray(values).view(np.uint64).reshape(values.shape) == MISSING.view(np.uint64)


class Records(Sequence[Row]):
    """Records in ascending order of steps. A slice has the rows of the slice, and shares their columns.

    >>> found = Records.of([{'step': 0, 'loss': 0.5}, {'step': 1, 'loss': 0.25, 'digest': '1f'}])
    >>> found[1]
    {'step': 1, 'loss': 0.25, 'digest': '1f'}
    >>> found.columns['loss']
    array([0.5 , 0.25])
    """

    def __init__(self, stored: Mapping[str, np.ndarray]):
        self._stored = stored
        self._columns: dict[str, np.ndarray] | None = None

    @classmethod
    def of(cls, rows: Iterable[Row]) -> 'Records':
        """Those of rows; as they are, where they are records already."""
        if isinstance(rows, cls):
            return rows
        rows = list(rows)
        if any(a[STEP] >= b[STEP] for a, b in itertools.pairwise(rows)):
            rows = sorted({row[STEP]: row for row in rows}.values(), key=operator.itemgetter(STEP))
        building = Builder()
        building.add(rows)
        return building.built()

    @property
    def steps(self) -> np.ndarray:
        """int64 [S]."""
        return self._stored.get(STEP, np.zeros(0, np.int64))

    @property
    def columns(self) -> Series:
        """Name -> float64 [S], MISSING where a row lacks the name. Texts are left out."""
        if self._columns is None:
            there = {name: v for name, v in self._stored.items() if not _is_absent(v)}  # as of a slice
            made = {name: _floats(values) for name, values in there.items()}
            self._columns = {name: values for name, values in made.items() if values is not None}
        return self._columns

    @property
    def stored(self) -> Mapping[str, np.ndarray]:
        """Name -> values of their own type [S]: bool, int64, float64 with MISSING, short texts as bytes; or, of several
        types, the values themselves, with ABSENT. See `values_of`."""
        return self._stored

    @property
    def contiguous(self) -> bool:
        """Whether no step is missing between the first row and the last, and none is there twice."""
        return bool((np.diff(self.steps) == 1).all())

    def between(self, first: int, stop: int) -> 'Records':
        """Those of steps first … stop - 1."""
        return self[int(np.searchsorted(self.steps, first)) : int(np.searchsorted(self.steps, stop))]

    def blocks(self, rows: int = BLOCK) -> Iterator['Records']:
        """All of them in order, some rows at a time."""
        for start in range(0, len(self), rows):
            yield self[start : start + rows]

    def at(self, step: int) -> Row | None:
        """The record of a step, if there is one."""
        place = int(np.searchsorted(self.steps, step))
        return self[place] if place < len(self) and self.steps[place] == step else None

    def updated(self, rows: Iterable[Row]) -> 'Records':
        """With other rows beside these, or in place of those of the same steps."""
        new = Records.of(rows)
        kept = ~np.isin(self.steps, new.steps)
        order = np.argsort(np.concatenate([self.steps[kept], new.steps]))
        parts = [{name: v[kept] for name, v in self._stored.items()}, dict(new._stored)]
        sizes = [int(kept.sum()), len(new)]
        return Records(
            {
                name: _joined([p.get(name, n) for p, n in zip(parts, sizes, strict=True)])[order]
                for name in dict.fromkeys([*self._stored, *new._stored])
            }
        )

    def digest(self) -> str:
        """32 hex digits over every bit of every value."""
        whole = hashlib.sha256()
        for name in sorted(self._stored):
            values = self._stored[name]
            raw = repr(values.tolist()).encode() if values.dtype == object else values.tobytes()
            whole.update(f'{name!r} {values.dtype} {values.size}'.encode())
            whole.update(raw)
        return whole.hexdigest()[:32]

    def __len__(self) -> int:
        return int(self.steps.size)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> 'Records': ...

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Records({name: values[place] for name, values in self._stored.items()})
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        found = {name: _value(values[place]) for name, values in self._stored.items()}
        return {name: value for name, value in found.items() if value is not ABSENT}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self.blocks():
            for row in zip(*map(values_of, part._stored.values()), strict=True):
                yield {n: v for n, v in zip(self._stored, row, strict=True) if v is not ABSENT}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Builder:
    """Rows become columns, a block at a time."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._names: dict[str, None] = {}
        self._rows = 0

    def add(self, rows: Sequence[Row], most_cells: float = math.inf) -> None:
        """Takes the next rows.

        Args:
            rows: in ascending order of steps.
            most_cells: values that all columns may have, missing ones included.

        Raises:
            OverflowError: they would have more; nothing of the block that has too many is kept.
        """
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            names = _names(part)
            self._names.update(dict.fromkeys(names))
            self._rows += len(part)
            if len(self._names) * self._rows > most_cells:
                raise OverflowError(f'{len(self._names)} fields')
            self._blocks.append(_block(part, names))

    def built(self) -> Records:
        """All that was added. Nothing can be added after it."""
        blocks, self._blocks = self._blocks, []
        return Records({name: _joined([_of(block, name) for block in blocks]) for name in self._names})


class _Block(NamedTuple):
    rows: int
    columns: dict[str, np.ndarray]


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    """All fields; those of the first row in its order, if no other has others, or in another order."""
    names = tuple(rows[0])
    if all(tuple(row) == names for row in rows):
        return names
    return tuple(dict.fromkeys(name for row in rows for name in row))


def _block(rows: Sequence[Row], names: Sequence[str]) -> _Block:
    if all(len(row) == len(names) for row in rows):
        values: Iterable = zip(*map(operator.itemgetter(*names, names[0]), rows), strict=True)
    else:
        values = ([row.get(name, ABSENT) for row in rows] for name in names)
    return _Block(len(rows), dict(zip(names, map(_column, values), strict=False)))


def _column(values: Sequence[Any]) -> np.ndarray:
    """Of one kind where all are of one; else of Python's own objects, so that each stays what it is."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return np.array(values, np.float64)
    if kinds == {float, object}:
        return np.array([MISSING if value is ABSENT else value for value in values], np.float64)
    if kinds == {bool}:
        return np.array(values, bool)
    if kinds == {int} and min(values) >= -(2**63) and max(values) < 2**63:
        return np.array(values, np.int64)
    if kinds == {str} and max(map(len, values)) <= TEXT and all(map(_is_plain, values)):
        return np.array(values, f'S{TEXT}')
    return _objects(values)


TEXT = 16
"""Characters of a text that takes no object of its own, as a digest."""


def _is_plain(text: str) -> bool:
    return text.isascii() and not text.endswith('\0')


def _objects(values: Sequence[Any]) -> np.ndarray:
    found = np.empty(len(values), object)
    found[:] = values
    return found


def _of(block: _Block, name: str) -> np.ndarray | int:
    """A block's part of a column; where it has none, its number of rows. Each is asked for once, and then gone."""
    return block.columns.pop(name, block.rows)


def _joined(parts: Sequence[np.ndarray | int]) -> np.ndarray:
    kinds = {part.dtype for part in parts if isinstance(part, np.ndarray)}
    if kinds == {np.dtype(np.float64)}:
        return np.concatenate([np.full(p, MISSING) if isinstance(p, int) else p for p in parts])
    if len(kinds) == 1 and not any(isinstance(part, int) for part in parts):
        return np.concatenate(parts)
    return np.concatenate([_objects([ABSENT] * p if isinstance(p, int) else values_of(p)) for p in parts])


def _is_absent(values: np.ndarray) -> bool:
    """Whether no row has the field."""
    if values.dtype == object:
        return all(value is ABSENT for value in values)
    return not values.size or bool(is_missing(values[:1]).all() and is_missing(values).all())


def _floats(values: np.ndarray) -> np.ndarray | None:
    """A column as numbers; None for one of texts, of which some may be numbers."""
    if values.dtype == np.float64:
        return values
    if values.dtype != object:
        return None if values.dtype.kind == 'S' else values.astype(np.float64)
    if any(isinstance(value, str) for value in values):
        return None
    return np.array([MISSING if v is ABSENT else math.nan if v is None else v for v in values], np.float64)


def values_of(values: np.ndarray) -> list[Any]:
    """A column as Python's own values, ABSENT where there is none."""
    if values.dtype.kind == 'S':
        return [value.decode() for value in values.tolist()]
    found = values.tolist()
    if values.dtype != np.float64:
        return found
    for place in np.flatnonzero(is_missing(values)):
        found[place] = ABSENT
    return found


def _value(value: Any) -> Any:
    """As `values_of`, of one."""
    return values_of(np.array([value]))[0] if isinstance(value, np.generic) else value


def series(rows: Iterable[Row]) -> Series:
    """Rows as columns: name -> float64 [S], MISSING where a row lacks the name. Texts are left out."""
    if isinstance(rows, Records):
        return rows.columns
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, str))
    return {name: np.array([row.get(name, MISSING) for row in rows], np.float64) for name in names}


def same(recorded: Row, computed: Row) -> bool:
    """Whether two records of a step agree bit for bit in all they share, and share a measurement."""
    shared = (recorded.keys() & computed.keys()) - {STEP}
    return bool(shared) and not different(recorded, computed)


def different(recorded: Row, computed: Row) -> list[str]:
    """Which of the fields that two records share differ by a bit."""
    return [name for name in recorded if name in computed and not _same(recorded[name], computed[name])]


def sound(row: Row) -> bool:
    """Whether each of its `finite_*` flags is set."""
    return all(value for name, value in row.items() if name.startswith('finite_'))


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN is the only value unequal to itself
