"""The same steps again under one change at a time, beside a control: which change averts a symptom, and so its cause.

Knows nothing of networks: a change is another step, other batches, or another state to start from.
"""

import concurrent.futures
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import detect, loop, predicate, telemetry
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.replay import Replayer, Subject
from jaxrnn.telemetry import Row
from jaxrnn.types import BatchAt, Series, Step, Tree

BUDGET = 2000
"""Steps that a diagnosis may replay."""

LEAD = 60
"""Steps before a symptom from which on a change acts, at least: most remedies must act for a while."""

AFTER = 50
"""Steps after a symptom through which a change must hold."""

FARTHER = 400
"""Steps after a symptom through which the best is replayed on, as far as the budget reaches."""

SHIFT, SHIFTED = 10, 0.1
"""A symptom comes earlier or later if by so many steps, and by this share of those since the start."""

SETTLED = 16
"""Last steps over which a loss is averaged."""

LOOK_EVERY = 8
"""Steps between looks for a symptom."""

SNAPSHOTS = 8
"""States of the control that are kept, for points of no return."""

NUDGE = 1e-6
"""Of each parameter, as a share: ten times float32's rounding, and nothing that training would notice."""

RESERVED = 0.35
"""Share of the budget kept for the best: to replay it on, and for its point of no return."""

MECHANISMS = {
    'low precision': 'rounding takes digits that training needs',
    'missing bias correction': 'means that start at zero make the first steps too long',
    'second-moment decay': "Adam's v decays in quiet steps until the next ones are too long",
    'outrun second moment': 'gradients grow faster than v, their squared mean, follows',
    'outlying gradients': 'single gradients far above the others throw the weights off',
    'shut gates': 'hard gates pass no gradient where they are shut',
    'recurrent gain': 'the recurrent weights amplify the state from step to step',
    'padding': 'what follows the last letter overwrites the state',
}
"""What makes a run break, the narrowest first: what takes one of these away hardly touches those after it. A change
that makes all steps shorter takes away none in particular."""

AVERTED, DELAYED, UNCHANGED, WORSE = VERDICTS = ('averted', 'delayed', 'unchanged', 'worse')
"""The best first."""


class Changed(NamedTuple):
    """What a change makes of a run."""

    step: Step
    batch_at: BatchAt
    convert: Callable[[Tree], Tree] = lambda state: state  # the run's state -> the changed run's


class Change(NamedTuple):
    """One thing done otherwise."""

    name: str
    points_to: str  # what it changes: data, model, optimiser, precision; '' of a baseline
    make: Callable[[], Changed]
    flags: str = ''  # by which training has it
    means: str = ''  # why it may help, for a person
    removes: str = (
        ''  # the mechanism that it takes away, of MECHANISMS or one's own; '' where it would help any
    )


class Made(NamedTuple):
    """A change that can be replayed."""

    changed: Changed
    observed: telemetry.Observed


class Outcome(NamedTuple):
    """What became of the symptom."""

    change: Change
    verdict: str  # of VERDICTS
    symptom: Symptom | None  # what showed, if anything did
    loss: float  # mean of the last steps; NaN where there is none, or one isn't finite
    reached: int  # the step after the last
    point_of_no_return: int | None = None  # the last step from which on the change still averts


class Window(NamedTuple):
    """The steps of an experiment."""

    start: int  # a checkpoint
    symptom: int
    horizon: int  # the step after the last


class Told(NamedTuple):
    """What all experiments gave."""

    window: Window | None  # None where there is no checkpoint before the symptom
    control: (
        Outcome | None
    )  # the steps as they were: 'unchanged' if they showed the symptom where the run had it
    identical: bool  # whether the control gave the run's records, bit for bit
    nudge: Outcome | None
    outcomes: tuple[Outcome, ...] = ()  # the best first
    drawn: Outcome | None = None  # one of them, drawn at random
    untried: tuple[Change, ...] = ()  # for want of budget
    steps_replayed: int = 0


def window_of(subject: Subject, step: int) -> Window | None:
    """From the newest checkpoint that gives changes time to act, else from the newest before the symptom."""
    before = [at for at in subject.checkpoints.steps() if at <= step]
    if not before:
        return None
    early = [at for at in before if at <= step - LEAD]
    return Window(early[-1] if early else before[0], step, step + 1 + AFTER)


# Changes that anybody's run can be given.


def nudged(subject: Subject, seed: int = 0) -> Change:
    """Every floating-point number of the state moved by a millionth of itself: a baseline. What this averts
    depends on chance."""

    def nudge(state: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(structure, [_nudged(x, key) for x, key in zip(leaves, keys, strict=True)])

    return Change('nudge', '', lambda: Changed(_step(subject), subject.batch_at, nudge))


def _nudged(x: Any, key: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x * (1 + NUDGE * jax.random.normal(key, jnp.shape(x))).astype(x.dtype)


def without_batch(subject: Subject, step: int) -> Change:
    """The batch of one step left out, that of the step before in its place. `step`: from 1 on."""
    return Change(
        f'without the batch of step {step}', 'data',
        lambda: Changed(_step(subject), loop.without(subject.batch_at, {step})), f'--skip_batches={step}',
        means='the batch itself is bad, or meets a state that it upsets',
    )  # fmt: skip


def other_batches(subject: Subject, window: Window) -> Change:
    """All of them from the steps before the window, so that the run has seen them."""
    length = window.horizon - window.start

    def batch_at(number: int) -> Tree:
        return subject.batch_at((number - length) % max(window.start, 1))

    return Change(
        'other batches', 'data', lambda: Changed(_step(subject), batch_at),
        means='the batches, or their order, and not the state',
    )  # fmt: skip


def _step(subject: Subject) -> Step:
    if subject.step is None:
        raise ValueError('a subject without its step can be replayed, not changed')
    return subject.step


class Experiments:
    """Experiments on one symptom of a run.

    Args:
        subject: the run, with its step.
        symptom: what it suffers from, as a bisect proved it.
        detectors: what counts as a symptom, gravest first; that of the symptom's kind among them.
        budget: steps that may be replayed in all.
    """

    def __init__(
        self,
        subject: Subject,
        symptom: Symptom,
        detectors: Sequence[Detector] = detect.DETECTORS,
        *,
        budget: int,
    ):
        self.subject, self.symptom, self.budget = subject, symptom, budget
        self.left: float = budget  # up to which steps may be replayed now
        own = [detector.kind for detector in detectors].index(symptom.kind)
        # What is less grave may still show, as a small spike where a collapse was averted.
        graver = [detector for detector in detectors[:own] if detector.kind != symptom.kind]
        nonfinite = detect.by_name('nonfinite')
        self.detectors = [nonfinite, *(d for d in [*graver, detectors[own]] if d.kind != nonfinite.kind)]
        self.window = window_of(subject, symptom.step)
        self.steps_replayed = 0
        self._history = [] if self.window is None else self._rows_before(self.window.start)
        self._control: list[Row] = []
        self._snapshots: dict[int, Tree] = {}
        self._compiler = concurrent.futures.ThreadPoolExecutor(1)
        self._made: dict[str, concurrent.futures.Future[Made]] = {}  # by name, so that each is compiled once

    def run(self, changes: Sequence[Change]) -> Told:
        """Control, nudge, and as many of the changes as the budget allows, in their order; then the best replayed on,
        and its point of no return."""
        if self.window is None:
            return Told(None, None, False, None, untried=tuple(changes))
        control, identical = self._show(changes[:1])
        if not identical or control.verdict != UNCHANGED:
            return Told(self.window, control, identical, None, (), None, tuple(changes), self.steps_replayed)
        self.left = self.budget * (1 - RESERVED)
        nudge = self._attempt(nudged(self.subject))
        tried = [
            (change, self._attempt(change, ahead=changes[place + 1 : place + 2]))
            for place, change in enumerate(changes)
        ]
        self.left = self.budget
        outcomes = [outcome for _, outcome in tried if outcome is not None]
        drawn = random.Random(self.symptom.step).choice(outcomes) if outcomes else None
        return Told(
            self.window,
            control,
            identical,
            nudge,
            tuple(self._proven(sorted(outcomes, key=_rank))),
            drawn,
            tuple(change for change, outcome in tried if outcome is None),
            self.steps_replayed,
        )

    def bad_batches(self, most: int = 4) -> tuple[int, ...]:
        """Steps in the window on whose batch the state that the window starts from fares badly, too: among the
        symptom's own and those whose loss or gradient stands out most."""
        assert self.window is not None
        start, symptom, _ = self.window
        columns = telemetry.series(row for row in self.subject.records if start <= row['step'] <= symptom)
        standing_out = _standing_out(columns) if columns else []
        steps = list(dict.fromkeys([symptom, *standing_out]))[:most]
        return tuple(sorted(step for step in steps if self._fares_badly(step)))

    def _fares_badly(self, step: int) -> bool:
        """By the rule of a spike, against the records before the window; without records by what isn't finite alone."""
        assert self.window is not None
        start = self.window.start
        (row,), _ = self._advance(
            self.subject.observed,
            lambda number: self.subject.batch_at(step),
            self._state(start),
            start,
            start + 1,
        )
        if not predicate.all_finite(telemetry.series([row]))[0]:
            return True
        spike = detect.by_name('spike')
        before = [row for row in self.subject.records if 0 < start - row['step'] <= spike.rule.lookback]
        columns = telemetry.series([*before, row])
        return (
            bool(detect.applicable(columns, [spike]))
            and detect.first_since(spike, columns, start) is not None
        )

    def _show(self, ahead: Sequence[Change]) -> tuple[Outcome, bool]:
        """The steps as they were, and whether they gave the run's records."""
        assert self.window is not None
        start, symptom, _ = self.window
        every = max(1, (symptom + 1 - start) // SNAPSHOTS)

        def keep(number: int, state: Tree) -> None:
            if (number - start) % every == 0:
                self._snapshots[number] = _copied(state)

        state = Replayer(self.subject).state(start)
        self._snapshots[start] = _copied(state)
        for change in ahead:
            self._make(change)
        self._control, _ = self._advance(
            self.subject.observed, self.subject.batch_at, state, start, symptom + 1, keep
        )
        recorded = {row['step']: row for row in self.subject.records}
        shared = [row for row in self._control if row['step'] in recorded]
        identical = all(telemetry.same(recorded[row['step']], row) for row in shared)
        found = self._first([*self._history, *self._control], start)
        unchanged = Change('none', '', lambda: Changed(_step(self.subject), self.subject.batch_at))
        return self._outcome(unchanged, found, self._control), identical

    def _make(self, change: Change) -> 'concurrent.futures.Future[Made]':
        """A change compiled, or being compiled by another thread."""
        if change.name not in self._made:
            self._made[change.name] = self._compiler.submit(self._compile, change)
        return self._made[change.name]

    def _compile(self, change: Change) -> Made:
        assert self.window is not None
        changed, ours = change.make(), self.subject
        if changed.step is ours.step:
            return Made(changed, ours.observed)
        made = Made(changed, telemetry.instrument(changed.step))
        start = self.window.start
        made.observed.prepare(changed.convert(_copied(self._snapshots[start])), changed.batch_at(start))
        return made

    def _attempt(
        self,
        change: Change,
        *,
        start: int | None = None,
        horizon: int | None = None,
        ahead: Sequence[Change] = (),
    ) -> Outcome | None:
        """What becomes of the symptom under a change; None where the budget doesn't reach the horizon.

        `ahead`: changes to be compiled meanwhile, if the budget will reach to one more.
        """
        assert self.window is not None
        start = self.window.start if start is None else start
        horizon = self.window.horizon if horizon is None else horizon
        if self.steps_replayed + horizon - start > self.left:
            return None
        changed, observed = self._make(change).result()
        if self.steps_replayed + 2 * (horizon - start) <= self.left:
            for later in ahead:
                self._make(later)
        state = changed.convert(self._state(start))
        history = [*self._history, *(row for row in self._control if row['step'] < start)]
        rows: list[Row] = []
        for first in range(start, horizon, LOOK_EVERY):
            stop = min(first + LOOK_EVERY, horizon)
            more, state = self._advance(observed, changed.batch_at, state, first, stop)
            rows += more
            if self._first([*history, *rows], first) is not None:
                break
        return self._outcome(change, self._first([*history, *rows], start), rows)

    def _proven(self, ranked: list[Outcome]) -> list[Outcome]:
        """The best that holds when it is replayed on comes first, with its point of no return."""
        assert self.window is not None
        for _ in range(len(ranked)):
            best = ranked[0]
            left = self.budget - self.steps_replayed - 2 * (self.window.horizon - self.window.start)
            horizon = min(self.window.symptom + FARTHER, self.window.start + left)
            if best.verdict != AVERTED:
                break
            if horizon > best.reached:
                again = self._attempt(best.change, horizon=horizon)
                assert again is not None
                if again.verdict != AVERTED:
                    ranked = sorted([again, *ranked[1:]], key=_rank)
                    continue
                best = again
            ranked[0] = best._replace(point_of_no_return=self._point_of_no_return(best.change))
            break
        return ranked

    def _point_of_no_return(self, change: Change) -> int:
        """By bisection, as far as the budget reaches; a change that averts from one step on is taken to do so from
        every earlier one."""
        assert self.window is not None
        averts, fails = self.window.start, self.window.symptom + 1
        while fails - averts > 1:
            middle = (averts + fails) // 2
            outcome = self._attempt(change, start=middle)
            if outcome is None:
                break
            averts, fails = (middle, fails) if outcome.verdict == AVERTED else (averts, middle)
        return averts

    def _state(self, step: int) -> Tree:
        """What `step` of the run starts from."""
        assert self.window is not None
        kept = max((at for at in self._snapshots if at <= step), default=None)
        if kept is None:
            return Replayer(self.subject).state(step)
        _, state = self._advance(
            self.subject.observed, self.subject.batch_at, _copied(self._snapshots[kept]), kept, step
        )
        return state

    def _advance(
        self,
        observed: telemetry.Observed,
        batch_at: BatchAt,
        state: Tree,
        start: int,
        stop: int,
        see: Callable[[int, Tree], None] = lambda number, state: None,
    ) -> tuple[list[Row], Tree]:
        rows: list[Row] = []

        def before(number: int, state: Tree) -> bool:
            see(number, state)
            return True

        digest_every = self.subject.digest_every
        number, state = loop.advance(
            observed, batch_at, state, start, stop, digest_every=digest_every, put=rows.append, before=before
        )
        self.steps_replayed += number - start
        return rows, state

    def _rows_before(self, step: int) -> list[Row]:
        """Those that the rules look back to: of the run, else replayed."""
        first = step - max(detector.rule.lookback for detector in self.detectors)
        if self.subject.records:
            return [row for row in self.subject.records if first <= row['step'] < step]
        replayer = Replayer(self.subject)
        rows = replayer.replay(max(first, self.subject.checkpoints.steps()[0]), step)
        self.steps_replayed += replayer.steps_replayed
        return rows

    def _first(self, rows: Sequence[Row], since: int) -> Symptom | None:
        """The gravest symptom from a step on."""
        columns = telemetry.series(rows)
        for detector in detect.applicable(columns, self.detectors):
            if (found := detect.first_since(detector, columns, since)) is not None:
                return found
        return None

    def _outcome(self, change: Change, found: Symptom | None, rows: Sequence[Row]) -> Outcome:
        assert self.window is not None
        losses = telemetry.series(rows[-SETTLED:]).get('loss', np.array([np.nan]))
        reached = rows[-1]['step'] + 1 if rows else self.window.start
        return Outcome(change, self._verdict(found), found, float(np.mean(losses)), reached)

    def _verdict(self, found: Symptom | None) -> str:
        assert self.window is not None
        if found is None:
            return AVERTED
        if found.kind != self.symptom.kind:
            return WORSE
        since = self.symptom.step - self.window.start
        shift = max(SHIFT, SHIFTED * since)
        if abs(found.step - self.symptom.step) <= shift:
            return UNCHANGED
        return DELAYED if found.step > self.symptom.step else WORSE


def _standing_out(columns: Series) -> list[int]:
    """Steps by how far their loss or gradient stands above the median of all, the farthest first; what isn't finite
    before all."""
    ratios = [
        np.nan_to_num(values / max(np.nanmedian(values), 1e-30), nan=np.inf)
        for values in (columns[name] for name in ('loss', 'gradient_norm') if name in columns)
    ]
    if not ratios:
        return []
    order = np.argsort(-np.max(ratios, axis=0), kind='stable')
    return [int(step) for step in columns[predicate.STEP][order]]


def _copied(state: Tree) -> Tree:
    """Which may be consumed, as a step does."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)


def _rank(outcome: Outcome) -> tuple[int, float]:
    loss = outcome.loss if np.isfinite(outcome.loss) else np.inf
    return VERDICTS.index(outcome.verdict), loss


# What the outcomes say.


def explain(
    subject: Subject,
    diagnosis: Diagnosis,
    changes: Callable[[Window, Sequence[int]], Sequence[Change]],
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    budget: int,
) -> tuple[Diagnosis, Told | None]:
    """A bisect's diagnosis with cause and remedies; as it was where there is nothing to explain.

    Args:
        subject: the run, with its step.
        diagnosis: of `replay.bisect`.
        changes: of the window and the steps whose batches are bad -> what is to be tried, in that order.
        detectors: as the bisect had them.
        budget: steps that may be replayed, those of the bisect included.
    """
    symptom, replayed = diagnosis.symptom, diagnosis.replay.steps_replayed
    if symptom is None or diagnosis.first_bad_step is None:
        return diagnosis, None
    experiments = Experiments(subject, symptom, detectors, budget=budget - replayed)
    bad: tuple[int, ...] = ()
    tried: Sequence[Change] = ()
    if experiments.window is not None:
        bad = experiments.bad_batches()
        tried = changes(experiments.window, bad)
    told = experiments.run(tried)
    made = dataclasses.replace(
        diagnosis,
        cause=cause_of(told, by_batch=bool(bad)),
        remedies=tuple(_as_remedy(outcome) for outcome in told.outcomes),
        replay=dataclasses.replace(diagnosis.replay, steps_replayed=replayed + told.steps_replayed),
    )
    return made, told


def in_order(
    subject: Subject, window: Window, bad_batches: Sequence[int], changes: Sequence[Change]
) -> list[Change]:
    """Changes with those of the data: these first where there are bad batches, else last."""
    left_out = [without_batch(subject, step) for step in bad_batches or [window.symptom] if step]
    others = other_batches(subject, window)
    return [*left_out, *changes, others] if bad_batches else [*changes, others, *left_out]


def _as_remedy(outcome: Outcome) -> dict[str, Any]:
    """As a diagnosis states it."""
    return {
        'name': outcome.change.name,
        'flags': outcome.change.flags,
        'outcome': outcome.verdict,
        'loss_at_horizon': outcome.loss if np.isfinite(outcome.loss) else None,
        'point_of_no_return': outcome.point_of_no_return,
    }


def cause_of(told: Told, *, by_batch: bool | None = None) -> Cause:
    """The cause that the pattern of outcomes names; of kind 'none' where it is undecided.

    Args:
        told: of `Experiments.run`.
        by_batch: whether the symptom is the batch's doing rather than the state's, if that is known: what isn't
            finite was born in the data, or an ordinary state, too, fares badly on the batch.
    """
    undecided = _why_undecided(told)
    if undecided:
        kind = 'none' if told.control is None or told.identical else 'nondeterminism'
        return Cause(kind, undecided)
    averting = [outcome for outcome in told.outcomes if outcome.verdict == AVERTED]
    if by_batch is False:
        # From a state at the edge any other batch averts a spike, too.
        averting = [outcome for outcome in averting if outcome.change.points_to != 'data']
    elif by_batch:
        averting = [outcome for outcome in averting if outcome.change.points_to == 'data'] or averting
    failed = [o.change.name for o in told.outcomes if o.verdict != AVERTED]
    fails = f'; not so {_listed(failed)}' if failed else ''
    if not averting:
        only = _listed([outcome.change.name for outcome in told.outcomes if outcome.verdict == AVERTED])
        return Cause('none', f'undecided: {only} averts it, but an earlier state bears the batch{fails}')
    mechanism = _mechanism(told.outcomes, averting)
    # What takes the mechanism away speaks before what would have helped against any.
    averting.sort(key=lambda outcome: outcome.change.removes != mechanism)
    best, *others = averting
    also = f'; so does {_listed([o.change.name for o in others])}' if others else ''
    named = f'{mechanism} ({MECHANISMS[mechanism]}): ' if mechanism in MECHANISMS else ''
    named = named or (f'{mechanism}: ' if mechanism else '')
    return Cause(best.change.points_to, f'{named}{best.change.name} averts it{also}{fails}')


def _mechanism(outcomes: Sequence[Outcome], averting: Sequence[Outcome]) -> str:
    """The narrowest that a change of those averting takes away, and that none takes away without averting; '' where
    there is none."""
    refuted = {o.change.removes for o in outcomes if o.verdict != AVERTED}
    left = dict.fromkeys(o.change.removes for o in averting if o.change.removes not in {'', *refuted})
    order = [*MECHANISMS, *left]
    return min(left, key=order.index, default='')


def _why_undecided(told: Told) -> str:
    if told.window is None or told.control is None:
        return 'undecided: no checkpoint before the symptom, so nothing can be tried'
    if not told.identical:
        return 'not reproducible: the steps before the symptom came out otherwise than they were recorded'
    if told.control.verdict != UNCHANGED:
        return 'undecided: the same steps did not show the symptom again'
    if told.nudge is not None and told.nudge.verdict == AVERTED:
        return 'undecided: the symptom depends on chance; a state moved by a millionth averts it, too'
    if not told.outcomes:
        return 'undecided: the budget of steps allowed no experiment'
    if all(outcome.verdict != AVERTED for outcome in told.outcomes):
        return f'undecided: nothing tried averts it: {_listed([o.change.name for o in told.outcomes])}'
    return ''


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names)
