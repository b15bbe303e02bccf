"""The same steps again under one change at a time, beside a control: which change averts a symptom, and so its cause.

Knows nothing of networks: a change is another step, other batches, or another state to start from.
"""

import concurrent.futures
import dataclasses
import itertools
import random
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn import detect
from jaxrnn.bisect.replay import Replayer, Subject
from jaxrnn.detect import Detector, rules
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.experiment import cache
from jaxrnn.experiment.cause import cause_of, evidence_of, mechanism_of, ranked
from jaxrnn.experiment.changes import NUDGE, NUDGE_NAME, nudged, step_of
from jaxrnn.experiment.outcome import (
    AVERTED,
    DELAYED,
    MARGINS,
    UNCHANGED,
    WORSE,
    Change,
    Changed,
    ExperimentReport,
    Outcome,
    Window,
)
from jaxrnn.record import loop, telemetry
from jaxrnn.record.telemetry import Row
from jaxrnn.types import BatchAt, Series, Tree

BUDGET = 2000
"""Steps that a diagnosis may replay."""

LEAD = 60
"""Steps before a symptom from which on a change acts, at least: most remedies must act for a while."""

AFTER = 50
"""Steps after a symptom through which a change must hold."""

FARTHER = 400
"""Steps after a symptom through which the best is replayed on, as far as the budget reaches."""

ALIVE = 200
"""Steps after which a network that did not start to learn must have started under a change."""

SHIFT, SHIFTED = 10, 0.1
"""A symptom comes earlier or later if by so many steps, and by this share of those since the start."""

SETTLED = 16
"""Last steps over which a loss is averaged."""

LOOK_EVERY = 8
"""Steps between looks for a symptom."""

SNAPSHOTS = 8
"""States of the control that are kept, for points of no return."""

ACTED = 10
"""Times that a change must move a loss farther than a nudge does to count as having done anything: other roundings, of
another compilation, move it about as far as a nudge."""

RESERVED = 0.35
"""Share of the budget kept for the best: to replay it on, and for its point of no return."""


def window_of(subject: Subject, step: int, began: int | None = None) -> Window | None:
    """From the newest checkpoint that gives changes time to act, else from the newest before the symptom.

    Args:
        subject: the run.
        step: of the symptom.
        began: when the state set in that the symptom's rule waited for, the symptom's own step if it didn't wait. If
            that was long before, changes must act from there on, and the symptom is averted if the state is gone after
            ALIVE steps.
    """
    before = [at for at in subject.checkpoints.steps() if at <= step]
    if not before:
        return None
    early = [at for at in before if at <= step - LEAD]
    start = early[-1] if early else before[0]
    if began is None or began == step or began > start:
        return Window(start, step, step + 1 + AFTER)
    start = max((at for at in before if at <= began), default=before[0])
    return Window(start, start + ALIVE - 1, start + ALIVE, lasting=True)


Combine = Callable[[Change], Change | None]
"""A change -> it and another as one; None where there is no such."""


class CompiledChange(NamedTuple):
    """A change that can be replayed."""

    changed: Changed
    observed: telemetry.CompiledStep


class Experiments:
    """Experiments on one symptom of a run.

    Args:
        subject: the run, with its step.
        symptom: what it suffers from, as a bisect proved it.
        detectors: what counts as a symptom, gravest first; that of the symptom's kind among them.
        budget: steps that may be replayed in all.
        keep: a file for outcomes, which another process' experiments on the same symptom go on from.
    """

    def __init__(
        self,
        subject: Subject,
        symptom: Symptom,
        detectors: Sequence[Detector] = detect.DETECTORS,
        *,
        budget: int,
        keep: Path | None = None,
    ):
        self.subject, self.symptom, self.budget = subject, symptom, budget
        self.left: float = budget  # up to which steps may be replayed now
        own = [detector.kind for detector in detectors].index(symptom.kind)
        # What is less grave may still show, as a small spike where a collapse was averted.
        graver = [detector for detector in detectors[:own] if detector.kind != symptom.kind]
        nonfinite = detect.by_name('nonfinite')
        self.detectors = [nonfinite, *(d for d in [*graver, detectors[own]] if d.kind != nonfinite.kind)]
        self._own = detectors[own]
        columns = telemetry.series(subject.records) if subject.records else {}
        self.window = window_of(subject, symptom.step, detect.began(self._own, columns, symptom))
        self.steps_replayed = 0
        self._outcomes = cache.OutcomeCache(None, '')
        if self.window is not None and keep is not None and subject.records:
            scope = cache.scope(subject.records, symptom, self.window, self.detectors)
            self._outcomes = cache.OutcomeCache(keep, scope)
        self._history = [] if self.window is None else self._rows_before(self.window.start)
        self._control: list[Row] = []
        self._nudged: list[Row] = []
        self._snapshots: dict[int, Tree] = {}
        self._compiler = concurrent.futures.ThreadPoolExecutor(1)
        self._known: dict[Hashable, Outcome] = {}  # by the change's key
        self._made: dict[
            str, concurrent.futures.Future[CompiledChange]
        ] = {}  # by name, so that each is compiled once

    def run(
        self,
        changes: Sequence[Change],
        *,
        by_batch: bool | None = None,
        combine: Combine = lambda change: None,
    ) -> ExperimentReport:
        """Control, nudge, and as many of the changes as the budget allows, in their order; then how much longer steps
        the best bear; then the best replayed on, and its point of no return.

        Args:
            changes: what to try.
            by_batch: as in `cause.cause_of`.
            combine: a change that bears longer steps, but not much longer -> it and another as one, if there is such.
        """
        if self.window is None:
            return ExperimentReport(None, None, False, None, untried=tuple(changes))
        control, identical = self._show(changes[:1])
        if not identical or control.verdict != UNCHANGED:
            return ExperimentReport(
                self.window, control, identical, None, (), None, tuple(changes), self.steps_replayed
            )
        self.left = self.budget * (1 - RESERVED)
        nudge = self._attempt(nudged(self.subject))
        tried = [
            (change, self._outcome_of(change, ahead=changes[place + 1 : place + 2]))
            for place, change in enumerate(changes)
        ]
        self.left = self.budget * (1 - RESERVED / 2)
        self._confirm(tried, by_batch)
        self.left = self.budget
        outcomes = [outcome for _, outcome in tried if outcome is not None]
        at_random = random.Random(self.symptom.step).choice(outcomes) if outcomes else None
        return ExperimentReport(
            self.window,
            control,
            identical,
            nudge,
            tuple(self._proven(self._with_margins(outcomes, by_batch, combine), by_batch)),
            at_random,
            tuple(change for change, outcome in tried if outcome is None),
            self.steps_replayed,
        )

    def bad_batches(self, most: int = 4) -> tuple[int, ...]:
        """Steps in the window on whose batch the state that the window starts from fares badly, too: among the
        symptom's own and those whose loss or gradient stands out most."""
        assert self.window is not None
        start, symptom = self.window.start, self.window.symptom
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
        if not rules.all_finite(telemetry.series([row]))[0]:
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
        start, symptom = self.window.start, self.window.symptom
        every = max(1, (symptom + 1 - start) // SNAPSHOTS)

        def keep(number: int, state: Tree) -> None:
            if (number - start) % every == 0:
                self._snapshots[number] = _copied(state)

        state = Replayer(self.subject).state(start)
        self._snapshots[start] = _copied(state)
        self._make_ahead(ahead)
        self._control, _ = self._advance(
            self.subject.observed, self.subject.batch_at, state, start, symptom + 1, keep
        )
        recorded = {row['step']: row for row in self.subject.records}
        shared = [row for row in self._control if row['step'] in recorded]
        identical = all(telemetry.same(recorded[row['step']], row) for row in shared)
        found = self._found([*self._history, *self._control], start)
        unchanged = Change('none', '', lambda: Changed(step_of(self.subject), self.subject.batch_at))
        return self._outcome(unchanged, found, self._control), identical

    def _make(self, change: Change) -> 'concurrent.futures.Future[CompiledChange]':
        """A change compiled, or being compiled by another thread."""
        if change.name not in self._made:
            self._made[change.name] = self._compiler.submit(
                self._compile, change, jax.config.values['jax_enable_x64']
            )
        return self._made[change.name]

    def _make_ahead(self, changes: Sequence[Change]) -> None:
        """Those whose outcome isn't known already."""
        assert self.window is not None
        for change in changes:
            start = 0 if change.initial else self.window.start
            if self._outcomes.get(change.identity, start, self.window.horizon) is None:
                self._make(change)

    def _compile(self, change: Change, wide: bool) -> CompiledChange:
        """In another thread, which must be told whether there are 64-bit types (`wide`). Whatever else JAX's contexts
        hold for one thread alone costs another compilation, and no more."""
        assert self.window is not None
        with jax.enable_x64(wide):
            changed, ours = change.make(), self.subject
        if changed.step is ours.step and not changed.wide:
            return CompiledChange(changed, ours.observed)
        with jax.enable_x64(wide or changed.wide):
            made = CompiledChange(changed, telemetry.PlainStep(changed.step))
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
        if start is None:
            start = 0 if change.initial else self.window.start
        horizon = self.window.horizon if horizon is None else horizon
        if start < self.subject.checkpoints.steps()[0]:
            return None
        if self.steps_replayed + horizon - start > self.left:
            return None
        known = self._outcomes.get(change.identity, start, horizon)
        if known is not None:
            # As if it were replayed now, or else what the budget allows would be another choice of changes.
            self.steps_replayed += known.steps
            return Outcome(change, known.verdict, known.symptom, known.loss, known.reached, acted=known.acted)
        before = self.steps_replayed
        changed, observed = self._make(change).result()
        if self.steps_replayed + 2 * (horizon - start) <= self.left:
            self._make_ahead(ahead)
        begun = self._state(start)
        history = [row for row in (*self._history, *self._control) if row['step'] < start]
        rows: list[Row] = []
        with jax.enable_x64(changed.wide or jax.config.values['jax_enable_x64']):
            state = changed.convert(begun)
            for first in range(start, horizon, LOOK_EVERY):
                stop = min(first + LOOK_EVERY, horizon)
                more, state = self._advance(observed, changed.batch_at, state, first, stop)
                rows += more
                if self._first([*history, *rows], first) is not None:
                    break
        outcome = self._outcome(change, self._found([*history, *rows], start), rows)
        steps = self.steps_replayed - before
        self._outcomes.put(
            change.identity,
            start,
            horizon,
            cache.CachedOutcome(
                outcome.verdict, outcome.symptom, outcome.loss, outcome.reached, outcome.acted, steps
            ),
        )
        return outcome

    def _outcome_of(self, change: Change, ahead: Sequence[Change] = ()) -> Outcome | None:
        """As `_attempt`, of changes that come to the same replayed once."""
        known = None if change.key is None else self._known.get(change.key)
        if known is not None:
            return known._replace(change=change)
        outcome = self._attempt(change, ahead=ahead)
        if outcome is not None and change.key is not None:
            self._known[change.key] = outcome
        return outcome

    def _confirm(self, tried: list[tuple[Change, Outcome | None]], by_batch: bool | None) -> None:
        """Tries what the budget did not reach to and would take away the very mechanism that is named so far, until one
        of these refutes it, or all have averted: what one change says of a mechanism may be chance."""
        while True:
            outcomes = [outcome for _, outcome in tried if outcome is not None]
            named = mechanism_of(outcomes, evidence_of(outcomes, by_batch))
            place = next(
                (n for n, (change, o) in enumerate(tried) if o is None and named and change.removes == named),
                None,
            )
            outcome = None if place is None else self._outcome_of(tried[place][0])
            if place is None or outcome is None:
                return
            tried[place] = (tried[place][0], outcome)

    def _with_margins(
        self, outcomes: list[Outcome], by_batch: bool | None, combine: Combine
    ) -> list[Outcome]:
        """Outcomes with their margins, asked of one after the other in the order in which they speak, until one has
        the largest; and what they were combined into."""
        assert self.window is not None
        evidence = evidence_of(outcomes, by_batch)
        found = ranked(outcomes, by_batch=by_batch)
        for place, outcome in enumerate(tuple(found)):
            if self.window.lasting or outcome not in evidence:
                break
            if outcome.change.stressed is None:
                if outcome.change.removes:  # for good
                    break
                continue
            found[place] = outcome = self._with_margin(outcome)
            more = combine(outcome.change) if MARGINS[0] < (outcome.margin or 0) < MARGINS[-1] else None
            combined = None if more is None else self._outcome_of(more)
            if combined is not None:
                found.append(self._with_margin(combined) if combined.verdict == AVERTED else combined)
            if max(o.margin or 0 for o in found) == MARGINS[-1]:
                break
        return found

    def _with_margin(self, outcome: Outcome) -> Outcome:
        """None where the budget doesn't reach to the first question."""
        assert outcome.change.stressed is not None
        for margin, times in itertools.pairwise(MARGINS):
            change = outcome.change.stressed(times)
            under = None if change is None else self._outcome_of(change)
            if change is not None and under is None:
                return outcome._replace(margin=margin if margin > MARGINS[0] else None)
            if under is None or under.verdict != AVERTED:
                return outcome._replace(margin=margin)
        return outcome._replace(margin=MARGINS[-1])

    def _proven(self, outcomes: list[Outcome], by_batch: bool | None) -> list[Outcome]:
        """Outcomes in their order, of which the first has held when it was replayed on, and has its point of no
        return."""
        assert self.window is not None
        outcomes = ranked(outcomes, by_batch=by_batch)
        for _ in range(len(outcomes)):
            best = outcomes[0]
            left = self.budget - self.steps_replayed - 2 * (self.window.horizon - self.window.start)
            horizon = min(self.window.symptom + FARTHER, self.window.start + left)
            if best.verdict != AVERTED:
                break
            if best.change.initial:
                outcomes[0] = best._replace(point_of_no_return=0)
                break
            if horizon > best.reached:
                again = self._attempt(best.change, horizon=horizon)
                assert again is not None
                if again.verdict != AVERTED:
                    outcomes = ranked([again, *outcomes[1:]], by_batch=by_batch)
                    continue
                best = again._replace(margin=best.margin)
            outcomes[0] = best._replace(point_of_no_return=self._point_of_no_return(best.change))
            break
        return outcomes

    def _point_of_no_return(self, change: Change) -> int:
        """By bisection, as far as the budget reaches; a change that averts from one step on is taken to do so from
        every earlier one."""
        assert self.window is not None
        averts, fails = self.window.start, self.window.symptom + 1
        while fails - averts > 1:
            middle = (averts + fails) // 2
            later = middle - self.window.start if self.window.lasting else 0
            outcome = self._attempt(change, start=middle, horizon=self.window.horizon + later)
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
        observed: telemetry.CompiledStep,
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

    def _found(self, rows: Sequence[Row], since: int) -> Symptom | None:
        """What showed from a step on; of a state that lasts, what holds at the end."""
        assert self.window is not None
        found = self._first(rows, since)
        if found is not None or not self.window.lasting:
            return found
        rule, columns = self._own.lasting, _columns(rows)
        assert rule is not None
        return Symptom(self._own.kind, rows[-1]['step']) if rules.holds(rule, columns)[-1] else None

    def _first(self, rows: Sequence[Row], since: int) -> Symptom | None:
        """The gravest symptom from a step on."""
        assert self.window is not None
        columns = _columns(rows)
        at_once = [d for d in self.detectors if not (self.window.lasting and d.kind == self._own.kind)]
        for detector in detect.applicable(columns, at_once):
            if (found := detect.first_since(detector, columns, since)) is not None:
                return found
        return None

    def _outcome(self, change: Change, found: Symptom | None, rows: Sequence[Row]) -> Outcome:
        assert self.window is not None
        losses = telemetry.series(rows[-SETTLED:]).get('loss', np.array([np.nan]))
        reached = rows[-1]['step'] + 1 if rows else self.window.start
        if change.name == NUDGE_NAME:
            self._nudged = list(rows)
        acted = _acted(rows, self._control, self._nudged)
        return Outcome(change, self._verdict(found), found, float(np.mean(losses)), reached, acted=acted)

    def _verdict(self, found: Symptom | None) -> str:
        assert self.window is not None
        if found is None:
            return AVERTED
        if found.kind != self.symptom.kind:
            return WORSE
        if self.window.lasting:
            return UNCHANGED
        since = self.symptom.step - self.window.start
        shift = max(SHIFT, SHIFTED * since)
        if abs(found.step - self.symptom.step) <= shift:
            return UNCHANGED
        return DELAYED if found.step > self.symptom.step else WORSE


def _acted(rows: Sequence[Row], control: Sequence[Row], nudged: Sequence[Row]) -> bool:
    """Whether any loss is farther from the control's than ACTED times what a nudge had moved them by until then. True
    where that is unknown."""
    losses = [{row['step']: row['loss'] for row in each if 'loss' in row} for each in (rows, control, nudged)]
    steps = sorted(set.intersection(*(set(each) for each in losses)))
    if not steps:
        return True
    ours, theirs, moved = (np.array([each[step] for step in steps]) for each in losses)
    with np.errstate(all='ignore'):  # what isn't finite is no evidence
        noise = np.fmax.accumulate(np.fmax(np.abs(moved - theirs), NUDGE * np.abs(theirs)))
        return bool(np.any(np.abs(ours - theirs) > ACTED * noise))


def _columns(rows: Sequence[Row]) -> Series:
    """Of the fields that the newest row has: a changed step may record fewer than the run that it starts from."""
    return {name: column for name, column in telemetry.series(rows).items() if name in rows[-1]}


def _standing_out(columns: Series) -> list[int]:
    """Steps by how far their loss or gradient stands above the median of all, the farthest first; what isn't finite
    before all."""
    with np.errstate(all='ignore'):  # infinities among them
        ratios = [
            np.nan_to_num(values / max(np.nanmedian(values), 1e-30), nan=np.inf)
            for values in (columns[name] for name in ('loss', 'gradient_norm') if name in columns)
        ]
    if not ratios:
        return []
    order = np.argsort(-np.max(ratios, axis=0), kind='stable')
    return [int(step) for step in columns[rules.STEP][order]]


def _copied(state: Tree) -> Tree:
    """Which may be consumed, as a step does."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)


# What the outcomes say.


def explain(
    subject: Subject,
    diagnosis: Diagnosis,
    changes: Callable[[Window, Sequence[int]], Sequence[Change]],
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    budget: int,
    combine: Combine = lambda change: None,
    keep: Path | None = None,
) -> tuple[Diagnosis, ExperimentReport | None]:
    """A bisect's diagnosis with cause and remedies; as it was where there is nothing to explain.

    Args:
        subject: the run, with its step.
        diagnosis: of `replay.bisect`.
        changes: of the window and the steps whose batches are bad -> what is to be tried, in that order.
        detectors: as the bisect had them.
        budget: steps that may be replayed, those of the bisect included.
        combine: as in `Experiments.run`.
        keep: as in `Experiments`.
    """
    symptom, replayed = diagnosis.symptom, diagnosis.replay.steps_replayed
    if symptom is not None and diagnosis.cause.kind == 'hardware':
        report = _computed_again(subject, symptom, detectors, budget - replayed)
        return _with(diagnosis, diagnosis.cause, report), report
    if symptom is None or diagnosis.first_bad_step is None:
        return diagnosis, None
    experiments = Experiments(subject, symptom, detectors, budget=budget - replayed, keep=keep)
    bad: tuple[int, ...] = ()
    tried: Sequence[Change] = ()
    if experiments.window is not None:
        bad = experiments.bad_batches()
        tried = changes(experiments.window, bad)
    report = experiments.run(tried, by_batch=bool(bad), combine=combine)
    return _with(diagnosis, cause_of(report, by_batch=bool(bad)), report), report


def _with(diagnosis: Diagnosis, cause: Cause, report: ExperimentReport) -> Diagnosis:
    replay = diagnosis.replay
    return dataclasses.replace(
        diagnosis,
        cause=cause,
        remedies=tuple(_as_remedy(outcome) for outcome in report.outcomes),
        replay=dataclasses.replace(replay, steps_replayed=replay.steps_replayed + report.steps_replayed),
    )


def _computed_again(
    subject: Subject, symptom: Symptom, detectors: Sequence[Detector], budget: int
) -> ExperimentReport:
    """The steps before a symptom that did not come out as they were recorded: does it show again?"""
    experiments = Experiments(subject, symptom, detectors, budget=budget)
    again = Change(
        'the same steps again', 'hardware', lambda: Changed(step_of(subject), subject.batch_at),
        '--on_divergence=rewind', means='a fault of the hardware does not come again',
    )  # fmt: skip
    outcome = None if experiments.window is None else experiments._attempt(again)
    return ExperimentReport(
        experiments.window, None, False, None, () if outcome is None else (outcome,), None,
        () if outcome is not None else (again,), experiments.steps_replayed,
    )  # fmt: skip


def _as_remedy(outcome: Outcome) -> dict[str, Any]:
    """As a diagnosis states it."""
    return {
        'name': outcome.change.name,
        'flags': outcome.change.flags,
        'outcome': outcome.verdict,
        'loss_at_horizon': outcome.loss if np.isfinite(outcome.loss) else None,
        'point_of_no_return': outcome.point_of_no_return,
    }
