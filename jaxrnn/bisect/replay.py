"""The first bad step of a run, by bisection.

Knows nothing of networks: it takes a train step, the batch of each step, and checkpoints.
"""

import dataclasses
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from jaxrnn import detect
from jaxrnn.bisect import another_run, health
from jaxrnn.bisect.replayer import Replayer as Replayer
from jaxrnn.bisect.replayer import Subject as Subject
from jaxrnn.bisect.replayer import subject as subject
from jaxrnn.detect import Detector, rule_language
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.diagnosis import Replay as Replay
from jaxrnn.record.records import Records, Row, series
from jaxrnn.types import Series, UserError

log = logging.getLogger('jaxrnn')


def bisect(
    subject: Subject,
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    good: int | None = None,
    bad: int | None = None,
    alarms: Sequence[Detector] = detect.ALARMS,
    verify: bool = False,
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
        verify: whether to replay the whole run, symptom or not, so that what was silently computed wrongly shows.

    Returns:
        The diagnosis, and the rows that were replayed.

    Raises:
        UserError: nothing to replay; or nothing shows, and which field is the loss can't be told.
    """
    replayer = Replayer(subject)
    records = subject.recorded
    if records and records.contiguous:
        columns = records.columns
        usable = detect.bound(detectors, columns, subject.loss)
        found = detect.judged(columns, usable, subject.loss, good=good, bad=bad)
        if found.symptom is not None:
            replayer.replay(replayer.checkpoint_before(found.symptom.step), found.symptom.step + 1)
            columns = _completed(replayer).columns
            found = detect.judged(columns, usable, subject.loss, good=good, bad=bad)
        if verify:
            replayer.replay(subject.checkpoints.steps()[0], int(records.steps[-1]) + 1)
    else:
        if records:
            log.warning('the records have gaps; bisecting without them')
        low, high = _bounds(replayer, good, bad)
        found = _from_checkpoints(replayer, detectors, low, high)
        _verify(replayer, found.symptom, low, high)
        found = _of_this_run(replayer, found, detectors)
    diagnosis = _diagnosis(replayer, found, detectors, alarms)
    if diagnosis.symptom is None and diagnosis.replay.first_mismatch is None and subject.loss is None:
        _ask_for_loss(replayer, detectors)
    return diagnosis, [replayer.rows[step] for step in sorted(replayer.rows)]


def _completed(replayer: Replayer) -> Records:
    """The records, and what they lack as replayed: a loop may look at every number of the state but now and then."""
    recorded = replayer.recorded
    lacking = [
        {**row, **known}
        for step, row in replayer.rows.items()
        if (known := recorded.at(step)) is not None and not row.keys() <= known.keys()
    ]
    return recorded.updated(lacking) if lacking and replayer.first_mismatch is None else recorded


def _ask_for_loss(replayer: Replayer, detectors: Sequence[Detector]) -> None:
    """Nothing shows, but most rules are about a loss that isn't known. Raises UserError where several may be it."""
    rows = replayer.subject.records or [replayer.rows[step] for step in sorted(replayer.rows)]
    candidates = detect.loss_of(series(rows)).candidates
    if len(candidates) > 1 and any('loss' in detector.rule.fields for detector in detectors):
        raise detect.asked_for(candidates)


def began_of(subject: Subject, diagnosis: Diagnosis, detectors: Sequence[Detector] = detect.DETECTORS) -> int:
    """When a diagnosis' symptom began; see `detect.began`. Of a run without records what the bisect found."""
    symptom = diagnosis.symptom
    assert symptom is not None
    columns = subject.columns()
    if not columns:
        early = diagnosis.onset_step
        waits = symptom.kind in (*detect.LASTING, detect.WHEN)
        return symptom.step if early is None or waits else early
    known = detect.bound([*detectors, *detect.DETECTORS], columns, subject.loss)
    own = next((detector for detector in known if detector.kind == symptom.kind), None)
    return symptom.step if own is None else detect.began(own, columns, symptom, subject.loss)


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
) -> detect.Judgement:
    candidates = [s for s in replayer.subject.checkpoints.steps() if low <= s <= high]
    columns = series(replayer.replay(low, low + 1))
    loss = replayer.subject.loss
    usable = detect.bound(detectors, columns, loss)
    for detector in usable:
        # What diverged may have begun with a leap, which is seen where all is judged.
        if detector.kind != 'diverged' and _holds_at(replayer, detector, high):
            symptom = _between(replayer, detector, *_halve(replayer, detector, candidates))
            return detect.Judgement(symptom, None, ())
    log.warning('no rule holds at the last checkpoint (%d): replaying every step from %d on', high, low)
    columns = series(replayer.replay(low, high))
    return detect.judged(columns, usable, loss) if columns else detect.Judgement(None, None, ())


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
    replayer: Replayer, found: detect.Judgement, detectors: Sequence[Detector]
) -> detect.Judgement:
    """A symptom, unless its rule read steps whose replay led to another state than the run's."""
    symptom = found.symptom
    if symptom is None:
        return found
    lookback = max(each.rule.lookback for each in detectors if each.kind == symptom.kind)
    read = range(symptom.step - lookback, symptom.step + 1)
    misled = any(each.start <= read[-1] and each.stop > read[0] for each in replayer.broken)
    return found._replace(symptom=None, event=None) if misled else found


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


def _where_holds(replayer: Replayer, detector: Detector, start: int, stop: int) -> np.ndarray:
    """The steps of start … stop - 1 at which a rule holds, with the history that it needs replayed too."""
    history = max(start - detector.rule.lookback, replayer.subject.checkpoints.steps()[0])
    columns = series(replayer.replay(history, stop))
    steps = columns[rule_language.STEP][rule_language.holds(detector.rule, columns)]
    return steps[steps >= start]


def _diagnosis(
    replayer: Replayer, found: detect.Judgement, detectors: Sequence[Detector], alarms: Sequence[Detector]
) -> Diagnosis:
    if replayer.first_mismatch is not None:
        cause = another_run.cause_of(replayer)
        return Diagnosis(symptom=found.symptom, cause=cause, replay=replayer.outcome())
    rows = _completed(replayer) or [replayer.rows[step] for step in sorted(replayer.rows)]
    diagnosis = _judged(series(rows), found, detectors, alarms, replayer.subject.loss)
    cause = dataclasses.replace(diagnosis.cause, why=f'{diagnosis.cause.why}{_but_for_rounding(replayer)}')
    return dataclasses.replace(diagnosis, cause=cause, replay=replayer.outcome())


def of_records(
    columns: Series,
    detectors: Sequence[Detector] = detect.DETECTORS,
    alarms: Sequence[Detector] = detect.ALARMS,
    loss: str | None = 'loss',
) -> Diagnosis:
    """What the records of a run say, with nothing replayed.

    Args:
        columns: of all records.
        detectors, alarms: as in `bisect`.
        loss: what they call the loss; None where that isn't known.
    """
    if not columns:
        return Diagnosis(cause=Cause('none', health.verdict(columns, detect.Judgement(None, None, ()))))
    found = detect.judged(columns, detect.bound(detectors, columns, loss), loss)
    return _judged(columns, found, detectors, alarms, loss)


def _judged(
    columns: Series,
    found: detect.Judgement,
    detectors: Sequence[Detector],
    alarms: Sequence[Detector],
    loss: str | None,
) -> Diagnosis:
    notes, symptom = health.checks(columns, found, detectors, loss), found.symptom
    if symptom is None:
        return Diagnosis(checks=notes, cause=Cause('none', health.verdict(columns, found)))
    warned = detect.onset(columns, symptom, alarms)
    own = next(d for d in detect.bound(detectors, columns, loss) if d.kind == symptom.kind)
    began = detect.began(own, columns, symptom, loss)
    return Diagnosis(
        symptom=symptom,
        first_bad_step=symptom.step,
        onset_step=began if warned is None else min(began, warned.step),
        checks=notes,
        cause=Cause('none', 'not looked for: bisection names the step, not the cause'),
    )


def _but_for_rounding(replayer: Replayer) -> str:
    """How well a replay agrees that is the run's only up to rounding."""
    digits = [each.digits for each in replayer.agreements.values() if each.rounding]
    if not digits:
        return ''
    said = f'the replay agrees with the checkpoints to {min(digits)} digits, not bit for bit'
    log.warning('%s: the run was compiled otherwise', said)
    return f'; {said}'
