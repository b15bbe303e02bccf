"""Changes that anybody's run can be given: a nudge, other batches or one left out, float64; and where in the order."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import trace, tree
from jaxrnn.bisect.replay import Subject
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment.mechanisms import LOW_PRECISION
from jaxrnn.experiment.outcome import OTHER_BATCHES, Change, Changed
from jaxrnn.experiment.window import Window
from jaxrnn.record import loop
from jaxrnn.types import BatchAt, Record, Step, Tree

NUDGE = 1e-6
"""Of each parameter, as a share: ten times float32's rounding, and nothing that training would notice."""

NUDGE_NAME = 'nudge'


def nudged(subject: Subject, seed: int = 0) -> Change:
    """Every floating-point number of the state moved by a millionth of itself: a baseline. What this averts
    depends on chance."""

    def nudge(state: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(structure, [_nudged(x, key) for x, key in zip(leaves, keys, strict=True)])

    # Without identity: how far it moves the losses is asked of its rows.
    return Change(NUDGE_NAME, '', lambda: Changed(step_of(subject), subject.batch_at, nudge))


def _nudged(x: Any, key: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return x
    return x * (1 + NUDGE * jax.random.normal(key, jnp.shape(x))).astype(jnp.result_type(x))


def without_batch(subject: Subject, step: int, flags: str = '') -> Change:
    """The batch of one step left out, that of the step before in its place; that of the step after for the very first.

    Args:
        subject: the run.
        step: whose batch it is.
        flags: by which training leaves it out, if there are such.
    """
    batch_at = loop.without(subject.batch_at, {step}) if step else _first_replaced(subject.batch_at)
    return Change(
        f'without the batch of step {step}', 'data', lambda: Changed(step_of(subject), batch_at), flags,
        means='the batch itself is bad, or meets a state that it upsets', identity=f'without {step}', avoids=True,
    )  # fmt: skip


def _first_replaced(batch_at: BatchAt) -> BatchAt:
    return lambda step: batch_at(step or 1)


FEW, NEAR = 16, 600
"""Steps before a symptom began whose batches stand for all others: there must be so many, and no more are taken."""


def other_batches(subject: Subject, window: Window, began: int | None = None) -> Change:
    """From when the symptom began on the batches of the steps before that, again, which the run was well with; of one
    that began with the run those of the steps after the window.

    Args:
        subject: the run.
        window: of the experiments.
        began: when the symptom began; the window's start if not given.
    """
    since = max(window.start if began is None else began, window.start)
    length, near = window.horizon - since, min(since, NEAR)

    def batch_at(number: int) -> Tree:
        if number < since:
            return subject.batch_at(number)
        if since < min(FEW, length):
            return subject.batch_at(number + length)
        return subject.batch_at(since - near + (number - since) % near)

    return Change(
        OTHER_BATCHES, 'data', lambda: Changed(step_of(subject), batch_at),
        means='the batches, or their order, and not the state', identity=OTHER_BATCHES, avoids=True,
    )  # fmt: skip


def in_float64(subject: Subject) -> Change:
    """State and batches in float64, and with them all that a step computes, whatever types are written in it. What this
    averts, and a nudge doesn't, is the rounding's doing."""

    def made() -> Changed:
        step = trace.widened(step_of(subject))
        return Changed(step, lambda number: _widened(subject.batch_at(number)), _widened, wide=True)

    return Change(
        'float64', 'precision', made,
        means='numbers keep twice their digits', removes=LOW_PRECISION, identity='float64',
    )  # fmt: skip


def _widened(numbers: Tree) -> Tree:
    def widen(x: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        return x.astype(np.float64) if hasattr(x, 'astype') else np.float64(x)

    return jax.tree.map(widen, numbers)


def in_slow_motion(subject: Subject, share: float, name: str) -> Change:
    """Each step goes a share of its way: every floating-point number of the state is moved by that share of what the
    step moves it by. The same dynamics in shorter steps, as a lower learning rate makes them, for any optimiser."""
    step = step_of(subject)

    def shorter(state: Tree, batch: Tree) -> tuple[Tree, Record]:
        after, record = step(state, batch)

        def part(old: Any, new: Any) -> Any:
            if not jnp.issubdtype(jnp.result_type(new), jnp.floating):
                return new
            return (old + jnp.asarray(share, jnp.result_type(new)) * (new - old)).astype(jnp.result_type(new))

        return jax.tree.map(part, state, after), record

    return Change(
        name, 'optimiser', lambda: Changed(shorter, subject.batch_at),
        means='steps are shorter, as a lower learning rate makes them', identity=name, shortens=True,
    )  # fmt: skip


def guarded(subject: Subject) -> Change:
    """A step after which the state would not be finite is not taken."""
    step = step_of(subject)

    def careful(state: Tree, batch: Tree) -> tuple[Tree, Record]:
        after, record = step(state, batch)
        return jax.lax.cond(tree.all_finite(after), lambda: after, lambda: state), record

    return Change(
        'skip what is not finite', 'data', lambda: Changed(careful, subject.batch_at),
        means='a step that is not finite changes nothing, as under optax.apply_if_finite', identity='guard',
    )  # fmt: skip


def step_of(subject: Subject) -> Step:
    if subject.step is None:
        raise ValueError('a subject without its step can be replayed, not changed')
    return subject.step


def in_order(
    subject: Subject,
    window: Window,
    bad_batches: Sequence[int],
    changes: Sequence[Change],
    began: int,
    skip: Callable[[int], str] = lambda step: '',
) -> list[Change]:
    """Changes with those of the data: these first where there are bad batches, else last.

    Args:
        subject: the run.
        window: of the experiments.
        bad_batches: steps whose batches stand out.
        changes: to be tried beside.
        began: when the symptom began.
        skip: a step -> the flags by which training leaves its batch out.
    """
    left_out = [without_batch(subject, step, skip(step)) for step in bad_batches or [window.symptom]]
    wide, others = (
        in_float64(subject),
        other_batches(subject, window, window.start if window.lasting else began),
    )
    if bad_batches:
        return [*left_out, others, *changes, wide]
    return [*changes, wide, others, *left_out]


def of_anybody(
    subject: Subject,
    symptom: Symptom,
    window: Window,
    bad_batches: Sequence[int],
    changes: Sequence[Change],
    began: int,
) -> list[Change]:
    """In their order: the user's own changes, and those that any step can be given."""
    general = [in_slow_motion(subject, share, name) for share, name in SLOWER]
    if symptom.kind == 'nonfinite':
        general = [guarded(subject), *general]
    return in_order(subject, window, bad_batches, [*changes, *general], began)


SLOWER = ((0.1, 'a tenth of each step'), (0.01, 'a hundredth of each step'))
