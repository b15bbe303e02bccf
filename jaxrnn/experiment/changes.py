"""Changes that anybody's run can be given: a nudge, other batches or one left out, float64; and where in the order."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import trace, tree
from jaxrnn.bisect import health
from jaxrnn.bisect.replay import Subject
from jaxrnn.bisect.state_leap import StateLeap, state_leap
from jaxrnn.detect import rule_language
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment.mechanisms import LOW_PRECISION
from jaxrnn.experiment.outcome import OTHER_BATCHES, Change, Changed
from jaxrnn.experiment.window import Window
from jaxrnn.record import adam, kept_batches, loop
from jaxrnn.types import BatchAt, Record, Step, Tree, UserError

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
    return lambda step: batch_at(step if kept_batches.given_at(batch_at, step) else 1)


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
        means='steps are shorter, as a lower learning rate makes them', identity=name, shortens=1 / share,
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


def without_step(subject: Subject, step: int, leap: StateLeap | None) -> Change:
    """What one step does to the floating-point numbers of the state is left out; counters go on. That averts what the
    step itself did, whatever its batch.

    Args:
        subject: the run.
        step: the step that is left out.
        leap: how it moved the state, if far; of a tensor that leapt alone no length of steps is the cause.
    """
    ours = step_of(subject)

    def batch_at(number: int) -> Tree:
        return subject.batch_at(number), np.bool_(number == step)

    def kept(state: Tree, batch: Tree) -> tuple[Tree, Record]:
        batch, left_out = batch
        after, record = ours(state, batch)

        def of(old: Any, new: Any) -> Any:
            if not jnp.issubdtype(jnp.result_type(new), jnp.floating):
                return new
            return jnp.where(left_out, old, new).astype(jnp.result_type(new))

        return jax.tree.map(of, state, after), record

    set_back = _were_set_back(subject, step)
    means = 'the step did something else to the state than to train it'
    if set_back:
        means = "the optimiser's means were set back in it"
    elif leap is not None and leap.alone:
        means = f'it moved {leap.leaf} {leap.times:.3g} times as far as the steps before, and no other tensor'
    return Change(
        f'without step {step}', 'optimiser' if set_back else 'program', lambda: Changed(kept, batch_at),
        means=means, identity=f'without step {step}', unjudged=(step,),
        decides=set_back or (leap is not None and leap.alone),
    )  # fmt: skip


def _were_set_back(subject: Subject, step: int) -> bool:
    recorded = subject.recorded.at(step) or {}
    return recorded.get('moments_lost', 0) > health.MOST_LOST


RATE_CHANGED = 3
"""Times that a learning rate must be what it was to be tried as it was."""

WELL_KNOWN = 32
"""Steps before a symptom began of which the rate as it was is known."""


def other_rate(subject: Subject, began: int, last: int) -> Change | None:
    """Adam's learning rate as it was before a symptom began, if it is another since; the usual one, where it was far
    above that from the first step on. None where neither is so, or no rate can be told from the state."""
    columns = subject.columns()
    rates = columns.get(adam.RATE)
    if rates is None:
        return None
    steps = columns[rule_language.STEP]
    before = rates[(steps < began - 1) & np.isfinite(rates)]
    since = rates[(steps >= began - 1) & (steps <= last) & np.isfinite(rates)]
    if not since.size:
        return None
    now, first = float(np.median(since)), np.median(rates[np.isfinite(rates)][: health.FIRST_RATES])
    if before.size >= WELL_KNOWN:
        was = float(np.quantile(before, 0.9))
        extreme = max(since, key=lambda rate: abs(np.log(max(abs(rate), 1e-30) / max(abs(was), 1e-30))))
        if was > 0 and not all(was / RATE_CHANGED < rate < was * RATE_CHANGED for rate in (now, extreme)):
            return at_rate(subject, was, f'a learning rate of {was:.3g}, as before')
    if first > health.FAR_ABOVE * health.USUAL_RATE:
        return at_rate(subject, health.USUAL_RATE, f'the usual learning rate, {health.USUAL_RATE:g}')
    return None


def at_rate(subject: Subject, rate: float, name: str) -> Change:
    """Adam's steps at another learning rate, whatever the run's is; weight decay and the like as they are."""
    step = step_of(subject)

    def other(state: Tree, batch: Tree) -> tuple[Tree, Record]:
        after, record = step(state, batch)
        constants = adam.constants_of(step, state, batch)
        if constants is None:
            raise UserError('no Adam found in the state whose constants are written in the step')
        return adam.at_rate(constants, state, after, rate), record

    return Change(
        name, 'optimiser', lambda: Changed(other, subject.batch_at),
        means=f'the learning rate is {rate:.3g}', identity=name,
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
    set_off: int | None = None,
) -> list[Change]:
    """Changes with those of the data: these first where there are bad batches, else last.

    Args:
        subject: the run.
        window: of the experiments.
        bad_batches: steps whose batches stand out.
        changes: to be tried beside.
        began: when the symptom began.
        skip: a step -> the flags by which training leaves its batch out.
        set_off: the step that the symptom grew from, if there is such.
    """
    grew = [] if set_off is None or not window.start <= set_off < window.symptom else [set_off]
    steps = dict.fromkeys([*(bad_batches or [window.symptom]), *grew])
    left_out = [without_batch(subject, step, skip(step)) for step in steps]
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
    """In their order: the user's own changes, and those that any step can be given; what the records show first."""
    general = [in_slow_motion(subject, share, name) for share, name in SLOWER]
    if symptom.kind == 'nonfinite':
        general = [guarded(subject), *general]
    rate = other_rate(subject, began, symptom.step)
    general = [*([] if rate is None else [rate]), *general]
    if not bad_batches and not window.lasting:
        leap = state_leap(subject, began, symptom.step)
        step = began if leap is None else leap.step
        if step >= window.start:
            left_out = without_step(subject, step, leap)
            more = [without_batch(subject, step), left_out]  # only together they say that it isn't the batch
            general = [*more, *general] if left_out.decides else [*general, *more]
    ordered = in_order(subject, window, bad_batches, [*changes, *general], began)
    once: dict[str, Change] = {}
    for change in ordered:
        once.setdefault(change.name, change)
    return [*once.values()]


SLOWER = ((0.1, 'a tenth of each step'), (0.01, 'a hundredth of each step'))
