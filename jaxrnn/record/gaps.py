"""Records that a run lacks, computed again from its checkpoints when it goes on.

Records are what a bisect reads first; those with a gap it can't use. What is put in a gap is what the run had there, or
nothing: it is computed from the checkpoint before the gap, and held against the records around it and against the
checkpoint that it leads to.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn.record.records import Records, Row, same

log = logging.getLogger('jaxrnn')


class Replayed(NamedTuple):
    """Steps computed again."""

    rows: Sequence[Row]  # fewer than asked for, where a signal ended it
    digest: str  # of the state after them
    why_not: str | None = None  # there is nothing to compute them from


Replay = Callable[[int, int], Replayed]
"""Computes steps start … stop - 1 again, from the checkpoint `start`."""


class Known(NamedTuple):
    """What is known of a run, that steps computed again are held against."""

    records: Records
    digest_of: Callable[[int], str | None]  # of the state that a step with a checkpoint starts from


def healed(
    known: Known, stop: int, checkpoints: Sequence[int], replay: Replay, *, begins: int = 0
) -> dict[int, Row]:
    """The records that are missing before `stop`, by step, as far as they can be told; a line of the log says so.

    Args:
        known: of the run; the records of steps before `stop`.
        stop: the step that the run goes on with, from its checkpoint.
        checkpoints: the steps that have one, ascending.
        replay: computes steps again.
        begins: the run's first step.
    """
    lost = np.setdiff1d(np.arange(begins, stop), known.records.steps).tolist()
    starts = [at for at in checkpoints if at < stop]
    beyond = [step for step in lost if not starts or step < starts[0]]
    if beyond:
        log.warning(
            'the records of %s are missing for good: no checkpoint before them is left',
            named(beyond),
        )
    lost = lost[len(beyond) :]
    if lost:
        log.warning(
            'the records of %s are missing: computing them again, from the checkpoints before them',
            named(lost),
        )
    found: dict[int, Row] = {}
    for start, end in itertools.pairwise([*starts, stop]):
        part = [step for step in lost if start <= step < end]
        if part:
            found |= _again(known, part, start, end, replay)
    return found


def _again(known: Known, lost: Sequence[int], start: int, end: int, replay: Replay) -> dict[int, Row]:
    """The records of lost steps between two checkpoints; none where they can't be told to be what they were."""
    stop = min(lost[-1] + 2, end)  # one step more than is lost, whose record tells of all before it
    again = replay(start, stop)
    why_not = again.why_not
    if why_not is None and len(again.rows) == stop - start:
        other = _other(known, again, stop, end)
        if other is None:
            return {row['step']: row for row in again.rows if row['step'] in lost}
        why_not = f'computed again, step {other} comes out otherwise'
    if why_not is not None:
        log.warning('the records of %s stay missing: %s', named(lost), why_not)
    return {}


def _other(known: Known, again: Replayed, stop: int, end: int) -> int | None:
    """The first step that comes out otherwise than it was."""
    for row in again.rows:
        recorded = known.records.at(row['step'])
        if recorded is not None and not same(recorded, row):
            return row['step']
    saved = known.digest_of(end) if stop == end else None
    return stop - 1 if saved is not None and saved != again.digest else None


def named(steps: Sequence[int]) -> str:
    """Steps by their ranges: `steps 3, 7 to 9`."""
    starts = [step for place, step in enumerate(steps) if not place or steps[place - 1] != step - 1]
    stops = [step for place, step in enumerate(steps) if step + 1 not in steps[place + 1 : place + 2]]
    ranges = [str(a) if a == b else f'{a} to {b}' for a, b in zip(starts, stops, strict=True)]
    shown = ranges if len(ranges) <= MOST else [*ranges[:MOST], f'and {len(ranges) - MOST} more']
    return f'step{"" if len(steps) == 1 else "s"} {", ".join(shown)}'


MOST = 6
"""Ranges of steps that are named."""
