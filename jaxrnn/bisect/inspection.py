"""One step of a run inspected: what broke in it, or, where all is finite, what changed.

Knows nothing of networks, as `replay`: it takes a subject and the number of a step.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxrnn import detect, environment, progress, trace, tree
from jaxrnn.bisect import health
from jaxrnn.bisect.replay import Replayer, Subject, began_of
from jaxrnn.bisect.state_leap import SetOff, StateLeap, set_off_by, state_leap, still_tensors
from jaxrnn.diagnosis import Cause, Diagnosis
from jaxrnn.record.records import Records
from jaxrnn.trace import leading
from jaxrnn.types import Step, Tree, UserError

log = logging.getLogger('jaxrnn')

ORDINARY = 200
"""Steps before a step among whose losses an ordinary one is looked for."""

FINITE = ('dead', 'collapse', 'constant', 'stall', 'spike', 'diverged')
"""Symptoms, less grave than 'nonfinite', of steps in which all is finite. A user's own rule may hold for others."""


class Inspection(NamedTuple):
    """What inspecting a step gave."""

    step: int
    trace_report: trace.TraceReport | None  # of what isn't finite; None where it wasn't asked for
    comparison: trace.Comparison | None  # of a finite step against an earlier one
    against: int | None  # that one's number
    screens: tuple[dict[str, Any], ...] = ()  # what JAX's own tools say, as checks of a diagnosis
    precision: trace.PrecisionReport | None = None  # what float64 says, where it was asked for
    compiled: trace.CompiledDifference | None = None  # where only the compiled step isn't finite
    leap: StateLeap | None = None  # of a finite step, where the batch did not bring it
    set_off: SetOff | None = None  # what a symptom grew from, where it is this step
    still: tuple[str, ...] = ()  # tensors that don't move, where others do, of a run that died
    written: tuple[
        str, ...
    ] = ()  # tensors of the state that the step left not finite, where no equation broke

    def where(self) -> dict[str, Any] | None:
        """As a diagnosis states it."""
        if self.compiled is not None:
            return of_compiled(self.compiled)
        if self.trace_report is not None and self.trace_report.finding is not None:
            return of_finding(self.trace_report.finding)
        if self.written:
            return _of_tensor(self.written[0])
        if self.comparison is None:
            return None
        found = of_comparison(self.comparison)
        alone = self.leap.leaf if self.leap is not None and self.leap.alone else ''
        leaf = self.still[0] if self.still else alone
        return {**found, 'pass': 'update', 'op': '', 'source': '', 'layer': leaf} if leaf else found


def inspect(
    subject: Subject,
    step: int,
    *,
    finite: bool = False,
    against: int | None = None,
    screens: Sequence[str] = (),
    float64: bool = False,
) -> Inspection:
    """Evaluates one step of a run on the very state that it started from.

    Args:
        subject: the run, with its step.
        step: its number.
        finite: whether its record says that all is finite; else that is inspected first.
        against: an earlier step to hold a finite one against; the last ordinary one if not given.
        screens: of SCREENS, JAX's own tools to be asked, too.
        float64: whether to compute the step in float64 beside it, and say where digits are lost.

    Raises:
        UserError: there is no checkpoint before the step.
    """
    if subject.step is None:
        raise ValueError('a subject without its step can be replayed, not inspected')
    now = Replayer(subject).state(step), subject.batch_at(step)
    progress.told(f'looking into step {step}')
    with jax.debug_nans(False):  # which would raise where we look
        trace_report = None if finite else trace.first_bad(subject.step, *now)
        compiled, comparison = None, None
        written: tuple[str, ...] = ()
        if trace_report is not None and (trace_report.finding is None or trace_report.finding.kind == 'loop'):
            compiled = _compiled_otherwise(subject, *now)
        if compiled is None and trace_report is not None and trace_report.finding is None:
            written = _written(subject.step, *now)
        if compiled is None and not written and (trace_report is None or trace_report.finding is None):
            against = _ordinary(subject, step) if against is None else against
            if against is not None:
                before = Replayer(subject).state(against), subject.batch_at(against)
                comparison = trace.compare(subject.step, before, now, loss=subject.loss or 'loss')
        precision = trace.lost_precision(subject.step, *now) if float64 else None
    said = {name: SCREENS[name](subject.step, *now) for name in screens}
    checks = tuple(
        health.check(name, not answer, bool(answer), answer or 'found nothing')
        for name, answer in said.items()
    )
    return Inspection(
        step, trace_report, comparison, None if comparison is None else against, checks, precision, compiled,
        written=written,
    )  # fmt: skip


def locate(
    subject: Subject, diagnosis: Diagnosis, *, screens: Sequence[str] = ()
) -> tuple[Diagnosis, Inspection | None]:
    """Inspects the first bad step of a diagnosis, and says in it where; and that it is the compiler, where it is."""
    step, symptom = diagnosis.first_bad_step, diagnosis.symptom
    if step is None or symptom is None:
        return diagnosis, None
    try:
        found = _inspected(subject, diagnosis, screens)
    except UserError:
        raise
    except Exception as error:  # of a step that can't be traced or measured; JAX raises whatever it likes
        said = f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""}'
        log.warning("step %d can't be looked into: %s", step, said)
        unknown = health.check('the step can be looked into', None, 0, said[:200])
        return dataclasses.replace(diagnosis, checks=(*diagnosis.checks, unknown)), None
    finding = None if found.trace_report is None else found.trace_report.finding
    more = [] if finding is None else [what_broke(finding)]
    more += [] if found.leap is None else [what_leapt(found.leap)]
    more += [] if found.set_off is None else [what_set_it_off(found.set_off, step)]
    more += [what_stands_still(step, found.still)] if found.still else []
    more += [what_was_written(step, found.written)] if found.written else []
    checks = (*diagnosis.checks, *more, *found.screens)
    cause = diagnosis.cause if found.compiled is None else Cause('compiler', of_compiler(found.compiled))
    return dataclasses.replace(diagnosis, where=found.where(), checks=checks, cause=cause), found


def with_numbers(subject: Subject, diagnosis: Diagnosis) -> Diagnosis:
    """A diagnosis with what can be checked of a batch and a state without knowing what they mean: those of the first
    bad step; of a healthy run those of its last checkpoint."""
    step = diagnosis.first_bad_step
    if step is None:
        if diagnosis.replay.first_mismatch is not None or diagnosis.symptom is not None:
            return diagnosis
        step = subject.checkpoints.steps()[-1] if subject.checkpoints.steps() else None
    try:
        if step is None:
            return diagnosis
        found = health.of_numbers(subject.batch_at(step), Replayer(subject).state(step), step)
    except (
        Exception
    ) as error:  # of the user's batch_at beyond the run's last step, or of leaves that are no numbers
        log.debug('step %d: %s', step, error)
        return diagnosis
    return dataclasses.replace(diagnosis, checks=(*found, *diagnosis.checks))


def _inspected(subject: Subject, diagnosis: Diagnosis, screens: Sequence[str]) -> Inspection:
    """The step at which a symptom is seen, held against the last ordinary one before it began. What is dead is looked
    into where it died: later, nothing changes any more."""
    step, symptom = diagnosis.first_bad_step, diagnosis.symptom
    assert step is not None and symptom is not None
    if symptom.kind not in FINITE:
        return inspect(subject, step, screens=screens)
    began = min(began_of(subject, diagnosis), step)
    first = subject.checkpoints.steps()[0]
    if symptom.kind == 'dead':
        still = tuple(still_tensors(subject, step))
        step = max(began - 1, first)
        found = inspect(subject, step, finite=True, against=_ordinary(subject, step), screens=screens)
        return found._replace(still=still)
    sign = diagnosis.onset_step
    quiet = began if sign is None or began - sign > NEAR else min(began, sign)
    set_off = set_off_by(subject, quiet, step) if symptom.kind in GROWING else None
    seen, step = step, _leap(subject, began, step) if set_off is None else set_off.step
    against = _ordinary(subject, min(quiet, step))
    if against is None and step > first:
        against = first  # it began with the first step of all
    found = inspect(subject, step, finite=True, against=against, screens=screens)._replace(set_off=set_off)
    if found.comparison is None or found.comparison.by_batch:
        return found
    return found._replace(leap=state_leap(subject, began, seen))


def what_set_it_off(set_off: SetOff, seen: int) -> dict[str, Any]:
    """The step that a symptom grew from, as a check of a diagnosis."""
    why = (
        f'step {set_off.step} moved the state {set_off.times:.2g} times as far as the one before it, and what was seen '
        f'at step {seen} grew from there: place and examples are of step {set_off.step}'
    )
    return health.check('no step sets off the next ones', False, set_off.step, why)


GROWING = ('collapse', 'diverged')
"""Symptoms that are recognised some steps after the one that set them off."""

NEAR = 160
"""Steps before a symptom began within which its first sign is taken for the same thing: the state is no ordinary one
from there on."""


def _leap(subject: Subject, began: int, step: int) -> int:
    """The step at which the loss leapt, if it did between when a symptom began and when it was recognised."""
    columns = subject.columns()
    spikes = detect.bound(detect.named('spike'), columns, subject.loss) if columns else []
    if not spikes or began >= step:
        return step
    first = detect.first_since(spikes[0], columns, began - detect.SHORT)
    return first.step if first is not None and first.step < step else step


def of_finding(finding: trace.Finding) -> dict[str, Any]:
    """A finding as a diagnosis states it."""
    place = finding.op, finding.source, finding.layer, finding.time_step, finding.examples
    return _place(finding.pass_, *place)


def what_broke(finding: trace.Finding) -> dict[str, Any]:
    """What a place alone doesn't say of a finding, as a check of a diagnosis: its kind, the ranges of its operands, the
    iteration of each loop around it, the devices, the library's line."""
    operands = ', '.join(_numbers_of(one) for one in finding.operands)
    said = [
        f'{finding.kind} ({finding.detail or trace.KINDS[finding.kind]})',
        operands and f'operands: {operands}',
        finding.iterations and f'iteration {", ".join(map(str, finding.iterations))} of the loops around it',
        finding.devices and f'on {len(finding.devices)} devices, first {finding.devices[0]}',
        finding.library and f'in {finding.library}',
    ]
    why = '; '.join(each for each in said if each)
    return health.check('what broke', False, finding.elements, why)


def what_leapt(leap: StateLeap) -> dict[str, Any]:
    """A step that moved a tensor as no step before it did, as a check of a diagnosis."""
    others = 'no other tensor did nearly so' if leap.alone else 'others did so, too'
    why = f'step {leap.step} moved {leap.leaf} {leap.times:.3g} times as far as the steps before; {others}'
    return health.check('steps move the state alike', False, leap.times, why)


def what_was_written(step: int, leaves: Sequence[str]) -> dict[str, Any]:
    """Tensors that a step leaves not finite, though nothing that it computes is so, as a check of a diagnosis."""
    more = f', and {len(leaves) - MOST_NAMED} more' if len(leaves) > MOST_NAMED else ''
    why = (
        f'step {step} leaves {", ".join(leaves[:MOST_NAMED])}{more} not finite, and no operation of it makes that of '
        'finite numbers: the program has the number written in it'
    )
    return health.check('what broke', False, len(leaves), why)


def what_stands_still(step: int, leaves: Sequence[str]) -> dict[str, Any]:
    """Tensors that a step doesn't move, where it moves others, as a check of a diagnosis."""
    more = f', and {len(leaves) - MOST_NAMED} more' if len(leaves) > MOST_NAMED else ''
    why = f'step {step} does not move {", ".join(leaves[:MOST_NAMED])}{more}, and moves the others'
    return health.check('all tensors move', False, len(leaves), why)


MOST_NAMED = 5
"""Tensors that are listed."""


def _numbers_of(operand: trace.Range) -> str:
    """Its range; it has none where no number of it is finite."""
    name = operand.name or 'operand'
    if operand.low is None or operand.high is None:
        return f'{name} without a finite number'
    return f'{name} from {operand.low:.4g} to {operand.high:.4g}'


def of_compiled(found: trace.CompiledDifference) -> dict[str, Any] | None:
    """A piece that differs when it is compiled, as a diagnosis states it; None where no part of the step does."""
    if not found.primitives:
        return None
    return {
        'pass': found.pass_,
        'op': ', '.join(found.primitives),
        'source': found.source,
        'layer': found.layer,
        'time_step': None,
        'examples': [],
        'words': [],
    }


def of_compiler(found: trace.CompiledDifference) -> str:
    """What the compiler did, and which."""
    around = environment.describe()
    which = f'jax {around["jax"]}, jaxlib {around["jaxlib"]} on {around["platform"]}'
    bad = 'a NaN' if any(one.nans for one in found.compiled) else 'an infinity'
    what = f'the compiled step has {bad} that its own equations, computed one by one, do not have'
    if not found.primitives:
        return f'{what}; only the step as a whole shows it ({which})'
    piece = ', '.join(found.primitives)
    together = 'compiled as a loop' if found.kind == 'loop' else 'compiled together'
    return f'{what}: {piece} at {found.source}, {together} ({which})'


def of_comparison(comparison: trace.Comparison) -> dict[str, Any]:
    """A change as a diagnosis states it. Where the batch brought it, that is the place, with its examples; whatever
    grew in the step grew of them. Else it is the first absurd operation, or the largest share of each kind, which names
    no operation."""
    examples = leading(comparison.examples)
    if comparison.by_batch:
        if (outlying := comparison.outlying) is None:
            return _place('data', '', '', '', None, examples)
        found = sorted({*examples, *outlying.places})[: trace.MOST_EXAMPLES]
        return _place('data', 'input', outlying.path, '', None, found)
    if (absurd := comparison.absurd) is not None:
        # A state that is absurd came out of an update.
        named = absurd.examples or examples
        return _place(
            absurd.pass_ or 'update', absurd.op, absurd.source, absurd.layer, absurd.time_step, named
        )
    layer = comparison.layers[0].path if comparison.layers else ''
    time_step = comparison.time_steps[0].time_step if comparison.time_steps else None
    return _place('update', '', '', layer, time_step, examples)


def _of_tensor(leaf: str) -> dict[str, Any]:
    """A tensor of the state that a step did something to."""
    return _place('update', '', '', leaf, None, ())


def _place(
    pass_: str, op: str, source: str, layer: str, time_step: int | None, examples: Sequence[int]
) -> dict[str, Any]:
    return {
        'pass': pass_,
        'op': op,
        'source': source,
        'layer': layer,
        'time_step': time_step,
        'examples': list(examples),
        'words': [],
    }


def _compiled_otherwise(subject: Subject, state: Tree, batch: Tree) -> trace.CompiledDifference | None:
    """Where the step as training compiles it isn't finite, though its equations are."""

    def run(state: Tree, batch: Tree) -> Tree:
        return subject.observed(jax.tree.map(jnp.copy, state), batch, True)  # which consumes its state

    if tree.all_finite(run(state, batch)):
        return None
    try:
        return trace.compiled_otherwise(run, state, batch)
    except Exception as error:  # what can't be compiled in parts; JAX raises whatever it likes
        log.warning("the compiled step can't be held against its equations: %s", error)
        return None


def _written(step: Step, state: Tree, batch: Tree) -> tuple[str, ...]:
    """The leaves of a state that a step leaves not finite, and was given finite."""
    after, _ = step(jax.tree.map(jnp.copy, state), batch)  # which may consume its state
    before, after = tree.named_leaves(state), tree.named_leaves(after)
    return tuple(
        f'state/{path}'.rstrip('/')
        for path, leaf in after.items()
        if path in before and tree.all_finite([before[path]]) and not tree.all_finite([leaf])
    )


def _ordinary(subject: Subject, step: int) -> int | None:
    """The last step before it whose loss was no more than the median of those before; the very one before where there
    are no records; None for the first that can be replayed."""
    steps = subject.checkpoints.steps()
    if not steps or step <= steps[0]:
        return None
    before = subject.recorded.between(max(step - ORDINARY, steps[0]), step)
    return _last_ordinary(before, subject.loss) or step - 1


def _last_ordinary(rows: Records, loss: str | None) -> int | None:
    losses = rows.columns.get(loss or '')
    if losses is None or not np.isfinite(losses).any():
        return None
    median = np.median(losses[np.isfinite(losses)])
    places = np.flatnonzero(losses <= median)
    return int(rows.steps[places[-1]]) if places.size else None


def _by_checkify(step: Step, state: Tree, batch: Tree) -> str:
    error, _ = jax.jit(checkify.checkify(step, errors=checkify.float_checks))(state, batch)
    return (error.get() or '').split('\n')[0]


def _by_debug_nans(step: Step, state: Tree, batch: Tree) -> str:
    # A function of its own: jax_debug_nans overlooks a NaN in one whose first calls were healthy.
    with jax.debug_nans(True):
        try:
            jax.block_until_ready(jax.jit(lambda state, batch: step(state, batch))(state, batch))
        except FloatingPointError as error:
            return str(error).split('\n')[0]
    return ''


SCREENS: Mapping[str, Callable[[Step, Tree, Tree], str]] = {
    'checkify': _by_checkify,
    'debug_nans': _by_debug_nans,
}
"""JAX's own tools: what each says of a step, nothing where it finds nothing."""
