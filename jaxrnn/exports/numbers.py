"""The numbers of records for formats that have no text: each record as step, time and values by spelled name."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxrnn.exports import Recorded, names
from jaxrnn.record.records import STEP

TIME = 'wall_time'
"""A field that a loop may have: when the step was taken, seconds since 1970. TensorBoard calls it so."""

LATEST = 1e11
"""Seconds since 1970, in the year 5138; thousandths of seconds are above it from 1973 on."""


class Measured(NamedTuple):
    """The numbers of one record."""

    step: int
    time: float  # seconds since 1970
    values: dict[str, float | int | bool]


def rows(run: Recorded, spell: Callable[[str], str]) -> Iterator[Measured]:
    """Each record in its order. Its time is what it says itself; else that of the one before, and of the first when the
    run was written last.

    Args:
        run: what is exported.
        spell: a field's name as the format can hold it.
    """
    times = run.records.columns.get(TIME)
    spelled = names.distinct((name for name in run.records.stored if name != STEP), spell)
    time = run.time
    for place, row in enumerate(run.records):
        if times is not None and 0 < times[place] < LATEST:
            time = float(times[place])
        values = {spelled[name]: v for name, v in row.items() if name != STEP and isinstance(v, int | float)}
        yield Measured(row[STEP], time, values)
