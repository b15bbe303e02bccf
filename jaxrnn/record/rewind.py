"""Going back while training: which checkpoint a symptom takes a run back to, and which batches it then leaves out.

As PaLM's authors did by hand (Chowdhery et al. 2022, section 5.1): from a checkpoint before a spike, without the
batches around it. The moments go back with the weights, never to zero. What was done is in the run's directory, and is
part of what a replay of the run repeats.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrnn import files
from jaxrnn.diagnosis import Symptom
from jaxrnn.record import layout
from jaxrnn.types import UserError

LEAD = 30
"""Steps before a symptom that the checkpoint is of, at least, where there is one: a state is bad before it shows."""

AROUND = 10
"""Batches left out before a symptom's step, its own included, when going back alone did not help."""

TRIES = 3
"""Times that a run goes back on account of the same steps."""


MOST_SKIPPED = 1_000_000
"""Batches left out in all."""


class Rewind(NamedTuple):
    """One time that a run went back."""

    kind: str  # of the symptom
    step: int  # of the symptom
    to: int  # the checkpoint
    skipped: tuple[int, int] | None  # the first and the last step whose batch is left out from then on
    done: bool  # False while the run is being taken back


def read(path: Path) -> list[Rewind]:
    """Those of a run. Raises UserError for a file that can't be read."""
    if not path.exists():
        return []
    try:
        rows = files.read_json(path)
        if not isinstance(rows, list):
            raise ValueError('no list')
        found = [_checked(row) for row in rows]
        if (
            sum(last - first + 1 for first, last in filter(None, (each.skipped for each in found)))
            > MOST_SKIPPED
        ):
            raise ValueError(f'more than {MOST_SKIPPED:,} batches left out')
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        said = str(error).removeprefix(f'{path}: ')
        raise UserError(
            f'--run_dir: {path} can not be read ({said}); without it the run can not be repeated'
        ) from error


def _checked(row: Any) -> Rewind:
    """Raises ValueError, TypeError or KeyError for what isn't one that `write` wrote."""
    row = files.unsealed(row)  # earlier versions sealed none
    made = Rewind(**{**row, 'skipped': None if row['skipped'] is None else tuple(row['skipped'])})
    found = [type(each) for each in (made.kind, made.step, made.to, made.done, *(made.skipped or ()))]
    if found != [str, int, int, bool, *[int] * (2 * (made.skipped is not None))]:
        raise ValueError('fields of other types')
    if min(made.step, made.to) < 0 or (made.skipped and not 1 <= made.skipped[0] <= made.skipped[1]):
        raise ValueError('steps of no run')
    return made


def write(path: Path, rewinds: Sequence[Rewind]) -> None:
    layout.write_json(path, [files.sealed(rewind._asdict()) for rewind in rewinds])


def skipped(rewinds: Sequence[Rewind]) -> Collection[int]:
    """The steps whose batches are left out."""
    ranges = [range(each.skipped[0], each.skipped[1] + 1) for each in rewinds if each.skipped is not None]
    return frozenset(step for steps in ranges for step in steps)


def plan(symptom: Symptom, checkpoints: Sequence[int], before: Sequence[Rewind]) -> Rewind | None:
    """What to do about a symptom; None where going back has been tried often enough, or there is nothing to go back to.

    The first time nothing is left out: a fault of the hardware does not come again. Then the batches around the symptom
    are, then all since the checkpoint.
    """
    earlier = [at for at in checkpoints if at <= symptom.step]
    if not earlier:
        return None
    early = [at for at in earlier if at <= symptom.step - LEAD]
    to = early[-1] if early else earlier[0]
    # At step 0 there is no step before the symptom.
    tried = sum(each.step == symptom.step or (each.to < symptom.step and to < each.step) for each in before)
    if tried >= TRIES:
        return None
    first = max(symptom.step - AROUND + 1, to) if tried == 1 else to
    # The first batch of all has none before it to take its place.
    left_out = (max(first, 1), symptom.step) if tried and symptom.step else None
    return Rewind(symptom.kind, symptom.step, to, left_out, done=False)
