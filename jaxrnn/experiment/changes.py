"""Changes that anybody's run can be given: a nudge, other batches or one left out, float64; and where in the order."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.bisect.replay import Subject
from jaxrnn.experiment.mechanisms import LOW_PRECISION
from jaxrnn.experiment.outcome import Change, Changed
from jaxrnn.experiment.window import Window
from jaxrnn.record import loop
from jaxrnn.types import Step, Tree

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
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x * (1 + NUDGE * jax.random.normal(key, jnp.shape(x))).astype(x.dtype)


def without_batch(subject: Subject, step: int) -> Change:
    """The batch of one step left out, that of the step before in its place. `step`: from 1 on."""
    return Change(
        f'without the batch of step {step}', 'data',
        lambda: Changed(step_of(subject), loop.without(subject.batch_at, {step})), f'--skip_batches={step}',
        means='the batch itself is bad, or meets a state that it upsets', identity=f'without {step}',
    )  # fmt: skip


def other_batches(subject: Subject, window: Window) -> Change:
    """All of them from the steps before the window, which the run has trained on."""
    length = window.horizon - window.start

    def batch_at(number: int) -> Tree:
        return subject.batch_at((number - length) % max(window.start, 1))

    return Change(
        'other batches', 'data', lambda: Changed(step_of(subject), batch_at),
        means='the batches, or their order, and not the state', identity='other batches',
    )  # fmt: skip


def in_float64(subject: Subject) -> Change:
    """State and batches in float64, and with them all that isn't fixed to be otherwise. What this averts, and a nudge
    doesn't, is the rounding's doing."""
    return Change(
        'float64', 'precision',
        lambda: Changed(step_of(subject), lambda step: _widened(subject.batch_at(step)), _widened, wide=True),
        means='numbers keep twice their digits', removes=LOW_PRECISION, identity='float64',
    )  # fmt: skip


def _widened(numbers: Tree) -> Tree:
    def widen(x: Any) -> Any:
        return x.astype(np.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    return jax.tree.map(widen, numbers)


def step_of(subject: Subject) -> Step:
    if subject.step is None:
        raise ValueError('a subject without its step can be replayed, not changed')
    return subject.step


def in_order(
    subject: Subject, window: Window, bad_batches: Sequence[int], changes: Sequence[Change]
) -> list[Change]:
    """Changes with those of the data: these first where there are bad batches, else last."""
    left_out = [without_batch(subject, step) for step in bad_batches or [window.symptom] if step]
    last = [in_float64(subject), other_batches(subject, window)]
    return [*left_out, *changes, *last] if bad_batches else [*changes, *last, *left_out]
