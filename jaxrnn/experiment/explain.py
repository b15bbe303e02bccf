"""From a bisect's diagnosis to cause and remedies: the experiments run, and what they say together."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrnn import detect
from jaxrnn.bisect.replay import Subject, began_of
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.experiment.cause import cause_of, still_by_batch
from jaxrnn.experiment.changes import step_of
from jaxrnn.experiment.engine import Experiments, budget_for, most_for
from jaxrnn.experiment.outcome import (
    AVERTED,
    DELAYED,
    MARGINS,
    UNCHANGED,
    Change,
    Changed,
    ExperimentReport,
    Level,
    Outcome,
)
from jaxrnn.experiment.strategies import (
    FARTHER,
    Combine,
    bad_batches,
    batches_changed,
    confirm,
    early_steps,
    from_start,
    in_turn,
    prove_best,
    with_margins,
)
from jaxrnn.experiment.window import AFTER, Window, window_of

RESERVED = 0.35
"""Share of the budget kept for the best: to replay it on, and for its point of no return."""


WINDOWS_FOR_THE_BEST = 3 + 2 * (len(MARGINS) - 1)
"""Windows that are replayed whatever the changes have taken: for the margins of the best, for the best with shorter and
decaying steps, for the margins of that, and two for the proof. Advice must not depend on how much there was to try."""


def run(
    experiments: Experiments,
    changes: Sequence[Change],
    *,
    by_batch: bool | None = None,
    combine: Combine = lambda change: None,
    changes_only: bool = False,
) -> ExperimentReport:
    """Control, nudge, and as many of the changes as the budget allows, in their order; then how much longer steps the
    best tolerate; then the best replayed on, its point of no return, and what it makes of the run's beginning.

    Args:
        experiments: on the symptom.
        changes: what to try.
        by_batch: as in `cause.cause_of`.
        combine: a change that tolerates longer steps, but not much longer -> it and another as one, if there is such.
        changes_only: whether the budget is for the changes alone, and for more steps where each takes more.
    """
    window, budget = experiments.window, experiments.budget
    control, identical = experiments.control(ahead=changes[:1])
    if not identical or control.verdict != UNCHANGED:
        return ExperimentReport(window, control, identical, None, (), None, tuple(changes), budget.spent)
    budget.hold_back(RESERVED)
    nudge = nudge_of(experiments)
    if changes_only:
        most = most_for(experiments.judge.symptom.step)
        budget.extend(experiments.window.length / window.length, most)
        budget.hold_back(RESERVED)
    tried = in_turn(experiments, changes)
    budget.hold_back(RESERVED / 2)
    tried = confirm(experiments, tried, by_batch)
    if changes_only:
        budget.ensure(WINDOWS_FOR_THE_BEST * experiments.window.length)
    budget.hold_back(0)
    outcomes = [outcome for _, outcome in tried if outcome is not None]
    by_batch = still_by_batch(outcomes, by_batch, nudge)
    at_random = random.Random(experiments.judge.symptom.step).choice(outcomes) if outcomes else None
    with_more = with_margins(experiments, outcomes, by_batch, combine)
    early = early_steps(experiments)
    if changes_only:  # beside the changes
        budget.set_aside(early)
    proven = prove_best(experiments, with_more, by_batch)
    budget.hold_back(0)
    beginning = from_start(experiments, proven[0], early) if proven else None
    untried = tuple(change for change, outcome in tried if outcome is None)
    return ExperimentReport(
        window,
        control,
        identical,
        nudge,
        tuple(proven),
        at_random,
        untried,
        budget.spent,
        beginning=beginning,
    )


def nudge_of(experiments: Experiments) -> Outcome | None:
    """What a nudge does. At the edge, where it only puts the symptom off for a while, all are judged over the longer
    time that it takes to come."""
    nudge, window = experiments.nudge(), experiments.window
    if (
        nudge is None
        or nudge.verdict not in (AVERTED, DELAYED)
        or nudge.symptom is not None
        or window.lasting
    ):
        return nudge
    later = window.symptom + FARTHER
    if not experiments.budget.allows(later - window.start):
        return nudge
    again = experiments.attempt(nudge.change, horizon=later)
    if again is None or again.symptom is None:
        return nudge
    experiments.longer(again.symptom.step + 1 + AFTER)
    return again


def explain(
    subject: Subject,
    diagnosis: Diagnosis,
    changes: Callable[[Window, Sequence[int]], Sequence[Change]],
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    budget: int | None = None,
    combine: Combine = lambda change: None,
    keep: Path | None = None,
) -> tuple[Diagnosis, ExperimentReport | None]:
    """A bisect's diagnosis with cause and remedies; as it was where there is nothing to explain.

    Args:
        subject: the run, with its step.
        diagnosis: of `replay.bisect`.
        changes: of the window and the steps whose batches are bad -> what is to be tried, in that order.
        detectors: as the bisect had them.
        budget: steps that may be replayed, those of the bisect included; if not given, `engine.budget_for` the
            changes, beside them.
        combine: as in `run`.
        keep: as in `Experiments`.
    """
    symptom = diagnosis.symptom
    hardware = diagnosis.cause.kind == 'hardware'
    if symptom is None or (not hardware and diagnosis.first_bad_step is None):
        return diagnosis, None
    if diagnosis.cause.kind not in ('none', 'hardware'):  # found already, as that the compiler did it
        return diagnosis, None
    began = began_of(subject, diagnosis, detectors)
    lasting = symptom.kind in (*detect.LASTING, detect.WHEN)
    window = window_of(subject, symptom.step, began, lasting=lasting)
    left = budget_for(symptom.step) if budget is None else budget - diagnosis.replay.steps_replayed
    if hardware:
        report = _computed_again(subject, symptom, window, detectors, left)
        return _with(diagnosis, diagnosis.cause, report), report
    if window is None:
        report = ExperimentReport(None, None, False, None)
        return _with(diagnosis, cause_of(report, by_batch=False), report), report
    experiments = Experiments(subject, symptom, window, detectors, budget=left, keep=keep, began=began)
    control, identical = experiments.control()
    shows = identical and control.verdict == UNCHANGED  # or else nothing is asked of it
    bad = bad_batches(experiments) if shows else ()
    by_batch = bool(bad) or (shows and batches_changed(experiments))
    report = run(
        experiments, changes(window, bad), by_batch=by_batch, combine=combine, changes_only=budget is None
    )
    report = report._replace(stood=_stood(subject, report.window or window))
    return _with(diagnosis, cause_of(report, by_batch=by_batch), report), report


STOOD = 3
"""Windows before a window, over which a loss that stands still falls by less than half, by their medians."""


def _stood(subject: Subject, window: Window) -> Level | None:
    """The loss before a window, if it had stood still for long; None where it hadn't, or isn't known."""
    steps, loss = STOOD * window.length, subject.loss
    rows = subject.recorded.between(window.start - steps, window.start)
    if loss is None or len(rows) < steps or loss not in rows.columns:
        return None
    losses = np.array_split(rows.columns[loss], STOOD)
    first, last = float(np.median(losses[0])), float(np.median(losses[-1]))
    return Level(last, steps) if np.isfinite([first, last]).all() and first / 2 < last < 2 * first else None


def _computed_again(
    subject: Subject, symptom: Symptom, window: Window | None, detectors: Sequence[Detector], budget: int
) -> ExperimentReport:
    """The steps before a symptom that did not come out as they were recorded: does it show again?"""
    again = Change(
        'the same steps again', 'hardware', lambda: Changed(step_of(subject), subject.batch_at),
        '--on_divergence=rewind', means='a fault of the hardware does not come again',
    )  # fmt: skip
    untried = ExperimentReport(window, None, False, None, untried=(again,))
    if window is None:
        return untried
    experiments = Experiments(subject, symptom, window, detectors, budget=budget)
    outcome = experiments.attempt(again)
    if outcome is None:
        return untried._replace(steps_replayed=experiments.budget.spent)
    return untried._replace(outcomes=(outcome,), untried=(), steps_replayed=experiments.budget.spent)


def _with(diagnosis: Diagnosis, cause: Cause, report: ExperimentReport) -> Diagnosis:
    replay = diagnosis.replay
    return dataclasses.replace(
        diagnosis,
        cause=cause,
        remedies=tuple(_as_remedy(outcome) for outcome in report.outcomes),
        replay=dataclasses.replace(replay, steps_replayed=replay.steps_replayed + report.steps_replayed),
    )


def _as_remedy(outcome: Outcome) -> dict[str, Any]:
    """As a diagnosis states it."""
    return {
        'name': outcome.change.name,
        'flags': outcome.change.flags,
        'outcome': f'{outcome.verdict}: {outcome.why}' if outcome.why else outcome.verdict,
        'loss_at_horizon': outcome.loss if np.isfinite(outcome.loss) else None,
        'point_of_no_return': outcome.point_of_no_return,
    }
