"""The first bad step of a run, by bisection.

Knows nothing of networks: it takes a train step, the batch of each step, and checkpoints.
"""

import itertools
import logging
from collections.abc import Sequence

import numpy as np

from jaxrnn import detect
from jaxrnn.bisect import another_run
from jaxrnn.bisect.replayer import Replayer as Replayer
from jaxrnn.bisect.replayer import Subject as Subject
from jaxrnn.bisect.replayer import subject as subject
from jaxrnn.detect import Detector, rule_language
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.diagnosis import Replay as Replay
from jaxrnn.record import telemetry
from jaxrnn.record.telemetry import Row
from jaxrnn.types import Series, UserError

log = logging.getLogger('jaxrnn')


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

    A replay that comes to a checkpoint is held against it. Where it leads to another state, the run was another
    than the one that is replayed: it is not reproducible, and no step is named.

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
            replayer.replay(replayer.checkpoint_before(symptom.step), symptom.step + 1)
    else:
        if rows:
            log.warning('the records have gaps; bisecting without them')
        low, high = _bounds(replayer, good, bad)
        symptom = _from_checkpoints(replayer, detectors, low, high)
        _verify(replayer, symptom, low, high)
        symptom = _of_this_run(replayer, symptom, detectors)
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


def _bounds(replayer: Replayer, good: int | None, bad: int | None) -> tuple[int, int]:
    """The checkpoints that bound the search."""
    steps = replayer.subject.checkpoints.steps()
    if not steps:
        raise UserError(
            f'{replayer.subject.checkpoints.directory}: no checkpoints; there is nothing to replay'
        )
    low = max((s for s in steps if good is not None and s <= good), default=steps[0])
    high = min((s for s in steps if bad is not None and s >= bad), default=steps[-1])
    return low, high


def _from_checkpoints(
    replayer: Replayer, detectors: Sequence[Detector], low: int, high: int
) -> Symptom | None:
    candidates = [s for s in replayer.subject.checkpoints.steps() if low <= s <= high]
    columns = telemetry.series(replayer.replay(low, low + 1))
    usable = detect.applicable(columns, detectors)
    for detector in usable:
        if _holds_at(replayer, detector, high):
            return _between(replayer, detector, *_halve(replayer, detector, candidates))
    log.warning('no rule holds at the last checkpoint (%d): replaying every step from %d on', high, low)
    return _sweep(replayer, usable, candidates)


def _verify(replayer: Replayer, symptom: Symptom | None, low: int, high: int) -> None:
    """Holds the replay against the checkpoints: against all of them where no symptom was found, else against one at
    least before it. Where it led to another state, the first such place is looked for."""
    steps = [s for s in replayer.subject.checkpoints.steps() if low <= s <= high]
    pairs = list(itertools.pairwise(steps))
    if symptom is not None and not replayer.verified:
        for start, stop in [(start, stop) for start, stop in pairs if stop <= symptom.step][-1:]:
            replayer.agreement(start, stop)
    if symptom is None or replayer.broken:
        for start, stop in pairs:
            found = replayer.agreement(start, stop)
            if found is not None and found.broken:
                break


def _of_this_run(
    replayer: Replayer, symptom: Symptom | None, detectors: Sequence[Detector]
) -> Symptom | None:
    """A symptom, unless its rule read steps whose replay led to another state than the run's."""
    if symptom is None:
        return None
    lookback = next(each.rule.lookback for each in detectors if each.kind == symptom.kind)
    read = range(symptom.step - lookback, symptom.step + 1)
    misled = any(each.start <= read[-1] and each.stop > read[0] for each in replayer.broken)
    return None if misled else symptom


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
    if replayer.first_mismatch is not None:
        cause = another_run.cause_of(replayer)
        return Diagnosis(symptom=symptom, cause=cause, replay=replayer.outcome())
    outcome = replayer.outcome()
    if symptom is None:
        return Diagnosis(
            cause=Cause('none', f'no rule holds at any step{_but_for_rounding(replayer)}'), replay=outcome
        )
    rows = replayer.subject.records or [replayer.rows[step] for step in sorted(replayer.rows)]
    warned = detect.onset(telemetry.series(rows), symptom, alarms)
    return Diagnosis(
        symptom=symptom,
        first_bad_step=symptom.step,
        onset_step=None if warned is None else warned.step,
        cause=Cause(
            'none',
            f'not looked for: bisection names the step, not the cause{_but_for_rounding(replayer)}',
        ),
        replay=outcome,
    )


def _but_for_rounding(replayer: Replayer) -> str:
    """How well a replay agrees that is the run's only up to rounding."""
    digits = [each.digits for each in replayer.agreements.values() if each.rounding]
    if not digits:
        return ''
    said = f'the replay agrees with the checkpoints to {min(digits)} digits, not bit for bit'
    log.warning('%s: the run was compiled otherwise', said)
    return f'; {said}'
