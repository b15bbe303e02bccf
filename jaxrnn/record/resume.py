"""Which checkpoint a run goes on from: the newest that is still what it was.

What a state was is known twice: by the digest in the checkpoint's meta, and by that in the record of the step before.
Each must agree, as far as it is there.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxrnn.record import checkpoint
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.types import Tree, UserError

log = logging.getLogger('jaxrnn')


class Intact(NamedTuple):
    """A checkpoint that a run can go on from."""

    step: int
    state: Tree
    meta: Mapping[str, Any]  # of its own; empty where it lacks one
    damaged: Mapping[int, str]  # newer ones that are not, and why


def newest_intact(checkpoints: Checkpoints, recorded: Callable[[int], str | None]) -> Intact | None:
    """The newest checkpoint that is what it was; None where there are no checkpoints at all. Nothing is changed.

    Args:
        checkpoints: of the run.
        recorded: step -> digest of the state that it starts from, as the records have it.

    Raises:
        UserError: there are checkpoints, and none is intact; says what the newest one suffers from.
    """
    damaged: dict[int, UserError] = {}
    for step in reversed(checkpoints.steps()):
        try:
            state, meta = _checked(checkpoints, step, recorded(step))
        except UserError as error:
            damaged[step] = error
        else:
            # What to do about a damaged one is not to be said where it is done.
            whys = {at: str(error).partition('; ')[0] for at, error in damaged.items()}
            return Intact(step, state, meta, whys)
    if damaged:
        raise damaged[max(damaged)]
    return None


def check_identity(root: Path, checkpoints: Checkpoints, identity: Mapping[str, str]) -> None:
    """Raises UserError where a run is of another identity, as the newest checkpoint with a meta of its own has it, and
    those before it. A run has one: where an older one agrees, what is newer was damaged."""
    refusal = None
    for step in reversed(checkpoints.steps()):
        meta = _meta(checkpoints, step)
        if not meta or meta.get('step', step) != step:
            continue
        other = [name for name, value in identity.items() if meta.get(name, value) != value]
        if not other:
            return
        refusal = refusal or (
            f'--run_dir: {root} holds a run of another {other[0]} ({meta[other[0]]}, not {identity[other[0]]}); '
            'choose another directory, or the same flags'
        )
    if refusal:
        raise UserError(refusal)


def set_aside(checkpoints: Checkpoints, intact: Intact | None) -> None:
    """Keeps what is no checkpoint, and newer than the one that the run goes on from, out of its way."""
    first, damaged = (-1, {}) if intact is None else (intact.step, intact.damaged)
    moved = checkpoints.set_aside_after(first)
    if moved:
        whys = '; '.join(damaged.values()) or 'without a state'
        start = 'the start' if intact is None else f'the checkpoint of step {first}'
        which = f'that of step {moved[0][0]} is' if len(moved) == 1 else _those(moved)
        names = ', '.join(path.name for _, path in moved)
        log.warning('going on from %s: %s damaged (%s), and kept as %s', start, which, whys, names)


def _those(moved: list[tuple[int, Path]]) -> str:
    return f'those of steps {", ".join(str(step) for step, _ in moved)} are'


def _checked(checkpoints: Checkpoints, step: int, recorded: str | None) -> tuple[Tree, Mapping[str, Any]]:
    """State and meta of a checkpoint. Raises UserError where it isn't what it was."""
    path = checkpoints.directory / str(step)
    meta, state = _meta(checkpoints, step), checkpoints.restore(step)
    own = meta is not None and meta.get('step', step) == step
    if not own and recorded is None:
        what = "can't be read" if meta is None else f'is of step {meta["step"]}'
        raise UserError(f'{path}: its meta {what}; delete the folder to go on from the one before')
    found = checkpoint.state_digest(state)
    saved = meta.get('state') if own and meta is not None else None
    for digest, where in ((saved, 'when it was saved'), (recorded, f'in the record of step {step - 1}')):
        if digest is not None and digest != found:
            raise checkpoint.altered(path, state, digest, where)
    if saved is None and recorded is None:
        log.warning(
            '%s: no digest says whether this checkpoint is of this run, or is still what it was', path
        )
    return state, meta if own and meta is not None else {}


def _meta(checkpoints: Checkpoints, step: int) -> Mapping[str, Any] | None:
    """What was saved beside a state: empty without any, None where it can't be read."""
    try:
        return checkpoints.meta(step)
    except UserError:
        return None
