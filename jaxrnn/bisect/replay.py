"""Going back: any step of a run again, bit for bit, and the first bad one by bisection.

Knows nothing of networks: it takes a train step, the batch of each step, and checkpoints.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn import detect, environment
from jaxrnn.detect import Detector, rule_language
from jaxrnn.diagnosis import Cause, Diagnosis, Replay, Symptom
from jaxrnn.record import loop, telemetry
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.record.telemetry import Row
from jaxrnn.types import BatchAt, Series, Step, Tree, UserError

log = logging.getLogger('jaxrnn')


class Subject(NamedTuple):
    """What the debugger is given: enough to go back anywhere."""

    observed: telemetry.CompiledStep  # the step as training compiled it
    batch_at: BatchAt
    checkpoints: Checkpoints
    records: Sequence[Row] = ()  # of the run, if there are any
    digest_every: int = 1
    step: Step | None = None  # to be evaluated equation by equation


def subject(
    step: Step,
    batch_at: BatchAt,
    checkpoints: Checkpoints,
    records: Sequence[Row] = (),
    *,
    digest_every: int = 1,
    checkify: bool = False,
) -> Subject:
    """Anybody's run, ready to be debugged.

    Args:
        step: the train step, `(state, batch) -> (state, record)`; the record may be any tree of scalars.
        batch_at: step number -> batch.
        checkpoints: where checkpoint k is the state that step k starts from.
        records: rows of the run; without them a bisect finds its way by checkpoints alone.
        digest_every: as in the run.
        checkify: as in the run.
    """
    observed = telemetry.instrument(step, checks=checkify)
    return Subject(observed, batch_at, checkpoints, records, digest_every, step)


class Replayer:
    """Replays steps, each at most once, and counts.

    Every replayed step that has a record is compared with it; after the first that differs the replay is
    another run, and nothing it shows counts.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.recorded = {row['step']: row for row in subject.records}
        self.rows: dict[int, Row] = {}
        self.probed: set[int] = set()
        self.steps_replayed = 0
        self.first_mismatch: int | None = None

    def outcome(self) -> Replay:
        verified = any(step in self.recorded for step in self.rows) or self._digests_met()
        identical = verified and self.first_mismatch is None
        return Replay(identical, self.first_mismatch, self.steps_replayed, len(self.probed))

    def state(self, step: int) -> Tree:
        """The state that `step` starts from, replayed from the newest checkpoint before it.

        Raises UserError when there is none, or when it was altered on disk.
        """
        return self._replay(self._checkpoint_before(step), step)

    def replay(self, start: int, stop: int) -> list[Row]:
        """The rows of steps start … stop - 1, computed now or earlier."""
        missing = [step for step in range(start, stop) if step not in self.rows]
        if missing:
            self._replay(self._checkpoint_before(missing[0]), missing[-1] + 1)
        return [self.rows[step] for step in range(start, stop) if step in self.rows]

    def _replay(self, checkpoint: int, stop: int) -> Tree:
        state = self.subject.checkpoints.restore(checkpoint)
        loop.check_digest(self.subject.checkpoints, checkpoint, state)
        self.probed.add(checkpoint)
        _, state = loop.advance(
            self.subject.observed,
            self.subject.batch_at,
            state,
            checkpoint,
            stop,
            digest_every=self.subject.digest_every,
            put=self._put,
        )
        return state

    def _put(self, row: Row) -> None:
        step = row['step']
        self.steps_replayed += 1
        self.rows[step] = row
        recorded = self.recorded.get(step)
        if recorded is not None and not telemetry.same(recorded, row):
            self.first_mismatch = step if self.first_mismatch is None else min(step, self.first_mismatch)

    def _digests_met(self) -> bool:
        """Whether, without a record, a replay reached a checkpoint and found its very state there.

        Also notes the mismatch where it didn't.
        """
        met = False
        for step in self.subject.checkpoints.steps():
            row = self.rows.get(step - 1, {})
            saved = self.subject.checkpoints.meta(step).get('state')
            if saved is None or telemetry.DIGEST not in row:
                continue
            met = True
            if saved != row[telemetry.DIGEST] and self.first_mismatch is None:
                self.first_mismatch = step - 1
        return met

    def _checkpoint_before(self, step: int) -> int:
        steps = self.subject.checkpoints.steps()
        before = [at for at in steps if at <= step]
        if not before:
            there = f'the first is of step {steps[0]}' if steps else 'there is none'
            raise UserError(
                f'{self.subject.checkpoints.directory}: no checkpoint at or before step {step} ({there}); '
                'steps before it can not be replayed'
            )
        return before[-1]


def bisect(
    subject: Subject,
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    good: int | None = None,
    bad: int | None = None,
    alarms: Sequence[Detector] = detect.ALARMS,
) -> tuple[Diagnosis, list[Row]]:
    """Names the symptom of a run and its first bad step, and proves it by replay.

    With records the step is read off them, and the steps from the checkpoint before it are replayed: each must
    give its record again. Without, the checkpoints are bisected: a checkpoint is bad when a rule holds at its
    step, judged on replayed steps. That takes a symptom that lasts to the end, as a NaN does; for one that
    passed by, all steps are replayed from the first checkpoint on.

    Args:
        subject: the run.
        detectors: rules, gravest first.
        good: a step before the symptom; the first checkpoint where it isn't given.
        bad: a step after it began; the run's end where it isn't given.
        alarms: of signals, which date the symptom's first sign.

    Returns:
        The diagnosis, and the rows that were replayed.
    """
    replayer = Replayer(subject)
    rows = list(subject.records)
    if rows and telemetry.contiguous(rows):
        symptom = _from_records(rows, detectors, good, bad)
        if symptom is not None:
            replayer.replay(replayer._checkpoint_before(symptom.step), symptom.step + 1)
    else:
        if rows:
            log.warning('the records have gaps; bisecting without them')
        symptom = _from_checkpoints(replayer, detectors, good, bad)
    return _diagnosis(replayer, symptom, alarms), [replayer.rows[step] for step in sorted(replayer.rows)]


def _from_records(
    rows: list[Row], detectors: Sequence[Detector], good: int | None, bad: int | None
) -> Symptom | None:
    columns = telemetry.series(rows)
    for detector in detect.applicable(columns, detectors):
        if (symptom := _first_between(detector, columns, good, bad)) is not None:
            return symptom
    return None


def _first_between(detector: Detector, columns: Series, good: int | None, bad: int | None) -> Symptom | None:
    """The first step after `good`, up to `bad`, at which a rule holds."""
    steps = columns[rule_language.STEP][rule_language.holds(detector.rule, columns)]
    low, high = -1 if good is None else good, np.inf if bad is None else bad
    steps = steps[(steps > low) & (steps <= high)]
    return Symptom(detector.kind, int(steps[0])) if steps.size else None


def _from_checkpoints(
    replayer: Replayer, detectors: Sequence[Detector], good: int | None, bad: int | None
) -> Symptom | None:
    steps = replayer.subject.checkpoints.steps()
    if not steps:
        raise UserError(
            f'{replayer.subject.checkpoints.directory}: no checkpoints; there is nothing to replay'
        )
    # Between the checkpoints that bound the search.
    low = max((s for s in steps if good is not None and s <= good), default=steps[0])
    high = min((s for s in steps if bad is not None and s >= bad), default=steps[-1])
    candidates = [s for s in steps if low <= s <= high]
    columns = telemetry.series(replayer.replay(low, low + 1))
    usable = detect.applicable(columns, detectors)
    for detector in usable:
        if _holds_at(replayer, detector, high):
            return _between(replayer, detector, *_halve(replayer, detector, candidates))
    log.warning('no rule holds at the last checkpoint (%d): replaying every step from %d on', high, low)
    return _sweep(replayer, usable, candidates)


def _halve(replayer: Replayer, detector: Detector, steps: list[int]) -> tuple[int, int]:
    """Neighbouring checkpoints, the first good and the second bad; both the first where it is bad itself."""
    if _holds_at(replayer, detector, steps[0]):
        return steps[0], steps[0]
    good, bad = 0, len(steps) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if _holds_at(replayer, detector, steps[middle]):
            bad = middle
        else:
            good = middle
    return steps[good], steps[bad]


def _holds_at(replayer: Replayer, detector: Detector, step: int) -> bool:
    return bool(_where_holds(replayer, detector, step, step + 1).size)


def _between(replayer: Replayer, detector: Detector, good: int, bad: int) -> Symptom:
    return Symptom(detector.kind, int(_where_holds(replayer, detector, good, bad + 1)[0]))


def _sweep(replayer: Replayer, detectors: Sequence[Detector], steps: list[int]) -> Symptom | None:
    """The gravest symptom of the whole range, at its first step."""
    for detector in detectors:
        if (where := _where_holds(replayer, detector, steps[0], steps[-1])).size:
            return Symptom(detector.kind, int(where[0]))
    return None


def _where_holds(replayer: Replayer, detector: Detector, start: int, stop: int) -> np.ndarray:
    """The steps of start … stop - 1 at which a rule holds, with the history that it needs replayed too."""
    history = max(start - detector.rule.lookback, replayer.subject.checkpoints.steps()[0])
    columns = telemetry.series(replayer.replay(history, stop))
    steps = columns[rule_language.STEP][rule_language.holds(detector.rule, columns)]
    return steps[steps >= start]


def _diagnosis(replayer: Replayer, symptom: Symptom | None, alarms: Sequence[Detector]) -> Diagnosis:
    outcome = replayer.outcome()
    if outcome.first_mismatch is not None:
        return Diagnosis(symptom=symptom, cause=_irreproducible(replayer, outcome), replay=outcome)
    if symptom is None:
        return Diagnosis(cause=Cause('none', 'no rule holds at any step'), replay=outcome)
    rows = replayer.subject.records or [replayer.rows[step] for step in sorted(replayer.rows)]
    warned = detect.onset(telemetry.series(rows), symptom, alarms)
    return Diagnosis(
        symptom=symptom,
        first_bad_step=symptom.step,
        onset_step=None if warned is None else warned.step,
        cause=Cause('none', 'not looked for: bisection names the step, not the cause'),
        replay=outcome,
    )


def _irreproducible(replayer: Replayer, outcome: Replay) -> Cause:
    """Says whether two replays agree with each other, and what differs around the run."""
    step = outcome.first_mismatch
    assert step is not None
    checkpoint = replayer._checkpoint_before(step)
    again = Replayer(replayer.subject)
    again.replay(checkpoint, step + 1)
    agree = telemetry.same(replayer.rows[step], again.rows[step])
    recorded = replayer.subject.checkpoints.meta(checkpoint).get('environment_details', {})
    differences = environment.differences(recorded, environment.describe()) if recorded else []
    around = f'; since the run, {", ".join(differences)}' if differences else ''
    what = (
        'two replays agree with each other, not with the run'
        if agree
        else 'two replays disagree with each other'
    )
    recorded_row = replayer.recorded.get(step, {})
    fields = telemetry.different(recorded_row, replayer.rows[step])
    if agree and telemetry.DIGEST in recorded_row and telemetry.DIGEST not in fields:
        measured = f'{", ".join(fields)} measured otherwise'
        return Cause(
            'none',
            f'not reproducible from step {step} on: the states agree bit for bit, but {measured}, as by another '
            f'version of the code that makes the record{around}; train again with this one',
        )
    kind = 'hardware' if agree and not differences else 'nondeterminism'
    return Cause(kind, f'not reproducible from step {step} on: {what}{around}')
