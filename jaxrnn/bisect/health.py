"""What the records say of anybody's run beside its symptom: checks that need no words; and the verdict without one."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrnn import detect, tree
from jaxrnn.detect import Detector, rule_language
from jaxrnn.record import adam, motion
from jaxrnn.record.records import is_missing
from jaxrnn.types import Series, Tree

TOO_SHORT = 32
"""Steps of which nothing can be said yet: rules compare with what was in as many steps before."""

LEARNT = 0.9
"""Share of the first loss below which the loss has come, if anything was learnt at all."""

PATIENCE = 100
"""Steps after which something should have been."""

Check = dict[str, Any]


def check(name: str, ok: bool | None, value: float, why: str) -> Check:
    """One line of a diagnosis' checks; a number that JSON lacks is written as 0."""
    value = float(value)
    return {'name': name, 'ok': ok, 'value': value if np.isfinite(value) else 0.0, 'why': why}


def verdict(columns: Series, found: detect.Judgement) -> str:
    """Of a run without a symptom."""
    steps = columns[rule_language.STEP].size if columns else 0
    if steps < TOO_SHORT:
        return f'too short to tell: {steps} steps, and no rule holds at any'
    passed = '; '.join(f'{note.kind} at step {note.step} passed: {note.why}' for note in found.notes[:3])
    more = f' and {len(found.notes) - 3} more' if len(found.notes) > 3 else ''
    return f'no rule holds at any step{f", but for what passed: {passed}{more}" if passed else ""}'


def checks(
    columns: Series, found: detect.Judgement, detectors: Sequence[Detector], loss: str | None
) -> tuple[Check, ...]:
    """Those that have something to say."""
    if not columns:
        return ()
    made = (
        _learnt(columns, loss),
        _what_was_not_finite(columns, found, loss),
        _came_back(found),
        _passed(found),
        _moments_kept(columns),
        _rate_usual(columns),
        _numbers_finite(columns, loss),
        _looked_for(columns, detectors, loss),
    )
    return tuple(each for each in made if each is not None)


SCALED = (1e-3, 1e2)
"""Root mean square of inputs, targets and weights that training by stock settings expects, generously."""


def of_numbers(batch: Tree, state: Tree, step: int) -> tuple[Check, Check]:
    """Whether a step's batch is finite, and whether it and the state that the step starts from are scaled.

    Args:
        batch: of the step.
        state: that it starts from.
        step: its number.
    """
    inputs = _float_leaves(batch, 'batch')
    bad = {path: int(np.sum(~np.isfinite(x))) for path, x in inputs.items() if not np.isfinite(x).all()}
    said = ', '.join(f'{count} of {inputs[path].size} in {path}' for path, count in bad.items())
    count = sum(x.size for x in inputs.values())
    good = f'all of {count:,} numbers are' if count else 'it has whole numbers and flags alone'
    why = f'step {step}: not finite {said}' if bad else f'step {step}: {good}'
    finite = check('the batch is finite', not bad, sum(bad.values()), why)
    sizes = {
        path: float(np.sqrt(np.mean(np.square(x[np.isfinite(x)], dtype=np.float64))))
        for path, x in {**inputs, **_float_leaves(state, 'state')}.items()
        if np.isfinite(x).any() and x.size > 1
    }
    # Of a state, momentum may be as small as it likes.
    unusual = {
        path: size
        for path, size in sizes.items()
        if size > SCALED[1] or (0 < size < SCALED[0] and path.startswith('batch'))
    }
    shown = sorted(unusual, key=lambda path: -abs(np.log(unusual[path])))[:3]
    listed = ', '.join(f'{path} {unusual[path]:.3g}' for path in shown)
    bounds = f'beyond {SCALED[0]:g} and {SCALED[1]:g}'
    why = f'root mean squares {bounds}: {listed}' if unusual else f'no root mean square is {bounds}'
    return finite, check('inputs and weights are scaled', None if unusual else True, len(unusual), why)


def _float_leaves(numbers: Tree, name: str) -> dict[str, np.ndarray]:
    leaves = tree.named_leaves(numbers).items()
    floats = {path: leaf for path, leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}
    return {f'{name}/{path}'.rstrip('/'): np.asarray(leaf, np.float64) for path, leaf in floats.items()}


def _learnt(columns: Series, loss: str | None) -> Check | None:
    """Whether the loss has come below where it began, and is there now."""
    losses = columns.get(loss, np.array([])) if loss else np.array([])
    finite = losses[np.isfinite(losses)]
    if finite.size < TOO_SHORT or finite[0] <= 0 or (finite <= 0).any():
        return None
    width = min(16, finite.size)
    means = np.convolve(finite, np.full(width, 1 / width), 'valid')
    best, last = float(means.min()), float(means[-1])
    why = f'the loss was {finite[0]:.3g} at first, {best:.3g} at best, and is {last:.3g} at the end'
    if last > finite[0] * 1.2:
        return check(
            'something was learnt', False, last / finite[0], f'{why}: worse than before the first step'
        )
    learnt = best < LEARNT * finite[0]
    ok = True if learnt else False if finite.size >= PATIENCE else None
    return check('something was learnt', ok, best / finite[0], why)


def _what_was_not_finite(columns: Series, found: detect.Judgement, loss: str | None) -> Check | None:
    """At the step of such a symptom: the loss, the state, or what the step itself says of its gradients."""
    if found.symptom is None or found.symptom.kind != 'nonfinite':
        return None
    place = int(np.flatnonzero(columns[rule_language.STEP] == found.symptom.step)[0])
    flags = [
        n.removeprefix('finite_') for n, v in columns.items() if n.startswith('finite_') and v[place] != 1
    ]
    numbers = [
        n
        for n, v in columns.items()
        if not (n.startswith('finite_') or np.isfinite(v[place]) or is_missing(v[place : place + 1])[0])
    ]
    named = ([f'the loss ({loss})'] if loss in numbers else []) + [
        f'the {flag}' for flag in flags if flag != 'loss'
    ]
    others = [name for name in numbers if name != loss]
    beside = f'; of the numbers beside it {", ".join(others)}' if others else ''
    why = f'at step {found.symptom.step} not finite: {", ".join(named) or "a number of the record"}{beside}'
    return check('loss and state are finite', False, len(named), why)


def _came_back(found: detect.Judgement) -> Check | None:
    event = found.event
    if event is None or not event.why:
        return None
    ok = None if event.back is not None else False
    return check('the run came back', ok, 0 if event.back is None else event.back - event.step, event.why)


def _passed(found: detect.Judgement) -> Check | None:
    if not found.notes:
        return None
    said = '; '.join(f'{note.kind} at step {note.step}: {note.why}' for note in found.notes[:5])
    more = f'; {len(found.notes) - 5} more' if len(found.notes) > 5 else ''
    return check('what passed', None, len(found.notes), said + more)


def _moments_kept(columns: Series) -> Check | None:
    """Whether an optimiser's mean squares were set back: the next steps are then far too long."""
    lost = columns.get('moments_lost')
    if lost is None or not (lost > MOST_LOST).any():
        return None
    places = np.flatnonzero(lost > MOST_LOST)
    step, share = int(columns[rule_language.STEP][places[0]]), lost[places[0]]
    why = f'step {step}: {share:.0%} of its mean squares fell farther than they can decay; they were set back'
    return check("the optimiser's moments are kept", False, places.size, why)


def _rate_usual(columns: Series) -> Check | None:
    """Whether Adam's learning rate, as its state shows it, is far above what it is usually given."""
    rates = columns.get(adam.RATE, np.zeros(0))
    first = np.abs(rates[np.isfinite(rates)][:FIRST_RATES])
    if not first.size or np.median(first) <= FAR_ABOVE * USUAL_RATE:
        return None
    rate = float(np.median(first))
    why = f'Adam began with a learning rate of {rate:.3g}, as its state shows; {USUAL_RATE:g} is usual'
    return check('the learning rate is usual', None, rate, why)


USUAL_RATE = 1e-3
"""Adam's (Kingma and Ba 2015, algorithm 1)."""

FAR_ABOVE = 50
"""So many times the usual rate is said, and tried without."""

FIRST_RATES = 32
"""Steps whose learning rates are the first, a warm-up's among them."""

MOST_LOST = 0.5
"""Share of them; a few fall where a guard or a mask is at work."""


def _numbers_finite(columns: Series, loss: str | None) -> Check | None:
    """What is logged beside the loss: a NaN there is a note, by name."""
    asked = {
        name: ~np.isfinite(values) & ~is_missing(values)  # what isn't logged at each step isn't NaN
        for name, values in columns.items()
        if name not in (loss, rule_language.STEP, *motion.FIELDS) and not name.startswith('finite_')
    }
    bad = {name: np.flatnonzero(found) for name, found in asked.items() if found.any()}
    if not bad:
        return None
    steps = columns[rule_language.STEP]
    said = ', '.join(
        f'{name} ({found.size} of {steps.size} steps, first {int(steps[found[0]])})'
        for name, found in bad.items()
    )
    return check('other numbers are finite', None, len(bad), f'not finite: {said}')


def _looked_for(columns: Series, detectors: Sequence[Detector], loss: str | None) -> Check | None:
    """Which symptoms can't be looked for, and which field each would need."""
    bound = detect.with_numbers(detectors, columns, loss)
    missing = detect.unjudged(columns, bound)
    if not missing:
        return None
    seen = ', '.join(each.kind for each in detect.applicable(columns, bound))
    needs = ', '.join(
        f'{kind} (needs {", ".join(fields) or "a first loss"})' for kind, fields in missing.items()
    )
    return check('symptoms looked for', None, len(missing), f'{seen or "none"}; not: {needs}')
