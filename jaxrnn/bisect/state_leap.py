"""Which tensors of a state a step moved: as no step before it did, as where something else than the optimiser wrote to
it; or not at all."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import tree
from jaxrnn.bisect.replayer import Replayer, Subject
from jaxrnn.detect import rule_language
from jaxrnn.record import motion
from jaxrnn.types import Array, Series, Tree

BEFORE = 8
"""Steps before it with which a step is compared."""

LEAP = 10
"""Times as far as in those that a step moves a tensor to count as a leap. Adam's longest steps are 7 times its usual
ones, by the bound on |m̂|/√v̂."""

ALONE = 10
"""Times as far as any other that a tensor leaps alone."""

NEAR = 64
"""Steps before a symptom began in which its leap is looked for."""


AHEAD = 16
"""Steps before the first sign from which on that one is looked for: signs are smoothed."""

USUAL = 200
"""Ordinary steps before that."""

FARTHER, UNUSUAL = 1.8, 1.3
"""How many times as far as the step before it that one moved the state, and as the farthest in 200 ordinary steps did.
Of the study's collapses at real size it was 2.1 to 3.5 times; ordinary steps are up to 1.4 (decision 27)."""


class SetOff(NamedTuple):
    """The step that a collapse grew from."""

    step: int
    times: float  # as far as the step before it did it move the state


class StateLeap(NamedTuple):
    """A step that moved a tensor farther than any before it."""

    step: int
    leaf: str  # as state/params/w: the one that leapt farthest
    times: float  # as far as in the steps before, by the root mean square
    alone: bool  # whether no other tensor leapt nearly so far


def state_leap(subject: Subject, began: int, last: int) -> StateLeap | None:
    """The step, from before a symptom began up to when it was seen, in which a tensor leapt.

    Args:
        subject: the run.
        began: when the symptom began.
        last: the step at which it was seen.

    Returns:
        None where none did, or there are too few steps before.
    """
    steps = subject.checkpoints.steps()
    if not steps:
        return None
    candidates = [k for k in _candidates(subject.columns(), began, last) if k >= steps[0] + 2]
    if not candidates:
        return None
    start, stop = max(min(candidates) - BEFORE, steps[0]), max(candidates) + 1
    state = Replayer(subject).state(start)
    names, moved = _tensors(state), []
    for step in range(start, stop):
        before = jax.tree.map(jnp.copy, state)
        state, _ = subject.observed(state, subject.batch_at(step), False)
        moved.append(np.asarray(_compiled_moves(before, state)))
    found = [_leap_of(k, names, np.array(moved[: k - start + 1])) for k in candidates]
    return max((leap for leap in found if leap is not None), key=lambda leap: leap.times, default=None)


def set_off_by(subject: Subject, quiet: int, seen: int) -> SetOff | None:
    """The step, from shortly before the first sign up to when a symptom was seen, that moved the state farthest beside
    the one before it. (Beside the steps before, as a leap is found, the last step of what grows would be the farthest.)

    Args:
        subject: the run.
        quiet: the last step before its first sign.
        seen: the step at which the symptom was seen.

    Returns:
        None where that wasn't far, or not farther than in ordinary steps, or isn't known.
    """
    columns = subject.columns()
    moved = columns.get('update_norm', columns.get('state_moved'))
    if moved is None or len(moved) < 2:
        return None
    steps = columns[rule_language.STEP].astype(int)[1:]
    with np.errstate(all='ignore'):
        times = np.nan_to_num(moved[1:] / moved[:-1], nan=0.0, posinf=0.0)
    first = quiet - AHEAD
    usual = times[(steps >= first - USUAL) & (steps < first)]
    near = (steps >= first) & (steps <= seen)
    if not near.any() or usual.size < USUAL // 2:
        return None
    place = int(np.argmax(np.where(near, times, 0)))
    found = SetOff(int(steps[place]), float(times[place]))
    return found if found.times > max(FARTHER, UNUSUAL * float(usual.max())) else None


def still_tensors(subject: Subject, step: int) -> list[str]:
    """The tensors that a step doesn't move, as state/params/w; none where nothing moves at all.

    Raises:
        UserError: there is no checkpoint before the step.
    """
    before = Replayer(subject).state(step)
    after, _ = subject.observed(jax.tree.map(jnp.copy, before), subject.batch_at(step), False)
    moved = np.asarray(_compiled_moves(before, after))
    return (
        [name for name, far in zip(_tensors(before), moved, strict=True) if far == 0] if moved.any() else []
    )


def _candidates(columns: Series, began: int, last: int) -> list[int]:
    """By the records the step that moved a state most beside those before it, where that was far; else those about the
    beginning."""
    moved = columns.get('state_moved')
    if moved is not None:
        steps = columns[rule_language.STEP].astype(int)
        near = np.flatnonzero((steps >= max(began - NEAR, steps[0] + 2)) & (steps <= last))
        times = [_times(moved[place], moved[max(place - BEFORE, 0) : place]) for place in near]
        if times and max(times) > LEAP:
            return [int(steps[near[int(np.argmax(times))]])]
    return [max(began - 1, 0), began]


def _times(moved: float, before: np.ndarray) -> float:
    usual = float(np.median(before)) if before.size else 0.0
    return float(np.nan_to_num(moved / usual, nan=0.0)) if usual > 0 else 0.0


def _leap_of(step: int, names: Sequence[str], moved: np.ndarray) -> StateLeap | None:
    """Of what the tensors were moved by [steps, tensors], of which the last row is of the step."""
    if len(moved) < 3:
        return None
    usual = np.median(moved[:-1], axis=0)
    times = np.where(usual > 0, moved[-1] / np.where(usual > 0, usual, 1), 0.0)
    times = np.where(np.isfinite(times), times, np.finfo(float).max)
    order = np.argsort(-times)
    first, others = times[order[0]], times[order[1:]]
    if first < LEAP:
        return None
    alone = bool(others.size) and first > ALONE * max(float(others[0]), 1.0)
    return StateLeap(step, names[order[0]], float(first), alone)


def _tensors(state: Tree) -> list[str]:
    numbers = motion.moving(state)
    return [f'state/{path}' for path in np.array([*tree.named_leaves(state)])[numbers]]


@jax.jit
def _compiled_moves(before: Tree, after: Tree) -> Array:
    """Root mean square of what each tensor was moved by, without overflow below 1e38."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    differences = [
        jnp.asarray(new - old, jnp.float32) for old, new in _chosen([*pairs], motion.moving(before))
    ]
    scales = [jnp.maximum(jnp.max(jnp.abs(d)), jnp.finfo(jnp.float32).tiny) for d in differences]
    rms = [s * jnp.sqrt(jnp.mean(jnp.square(d / s))) for d, s in zip(differences, scales, strict=True)]
    return jnp.stack(rms)


def _chosen(leaves: Sequence, numbers: Sequence[int]) -> list:
    return [leaves[number] for number in numbers]
