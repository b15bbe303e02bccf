"""Records -> symptoms, by rules over the records alone.

A detector is a named rule (`rule_language`), such as that for a collapse: what the user could have typed after --when.
A new one is one entry of DETECTORS.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn.detect import rule_language
from jaxrnn.detect.rule_language import Rule
from jaxrnn.diagnosis import Symptom
from jaxrnn.optim import signals
from jaxrnn.record.telemetry import Row, series
from jaxrnn.types import Series, Signal, UserError


class Detector(NamedTuple):
    """What one kind of symptom looks like in the records."""

    kind: str
    rule: Rule
    means: str  # what it usually means, for a person
    lasting: Rule | None = None  # the state that the rule waits for, where it waits before it says so


def _detector(kind: str, rule: str, means: str, lasting: str = '') -> Detector:
    return Detector(kind, rule_language.parse(rule), means, rule_language.parse(lasting) if lasting else None)


STALLED = 'median(loss, 400) > .99 * prev(median(loss, 400), 800) and smooth(cosine, 200) < .5'

DETECTORS = (
    _detector(
        'nonfinite',
        'not all_finite',
        'a NaN or an infinity appeared in the loss, the gradients, the update or the state',
    ),
    # Sudden: below the best of the last 200 steps by a quarter, by .1, and by 8 standard errors of a mean of
    # 16 steps, so that small batches, whose accuracy is noisy, raise no alarm.
    _detector(
        'collapse',
        'smooth(accuracy, 16) < .75 * max(smooth(accuracy, 16), 200)'
        ' and smooth(accuracy, 16) < max(smooth(accuracy, 16), 200) - .1'
        ' and smooth(accuracy, 16) < max(smooth(accuracy, 16), 200) - 2 * std(accuracy, 200)',
        'the network lost what it had learnt',
    ),
    # One hundredth of the targets' variance is the same output for all words. It counts where the outputs have varied,
    # or when they still don't after 1,000 steps. That they vary in the first 200 is no merit: those of the initial
    # weights do, and a network that learns the mean of its targets first gives that for every word, for a while.
    _detector(
        'constant',
        'variance_ratio < .01 and max(variance_ratio, 16) < .01'
        ' and (step >= 400 and max(variance_ratio, 200) > .05 or step >= 1000)',
        'the network gives nearly the same output for every input',
        lasting='variance_ratio < .01 and max(variance_ratio, 16) < .01',
    ),
    # Batches scatter the median of 400 losses by a hundredth; who learns slowly gains some hundredths in 800 steps. Who
    # predicts the targets' direction by half has learnt something: such a loss has converged.
    _detector(
        'stall',
        'step >= 1400 and ' + STALLED,
        'the loss no longer falls, though little has been learnt',
        lasting=STALLED,
    ),
    # Three times the trailing median is what a reader calls a spike; six standard deviations keep out noise, of the
    # logarithm, since a loss scatters by factors.
    _detector(
        'spike',
        'finite(loss) and loss > 3 * median(loss, 200)'
        ' and log(loss) > median(log(loss), 200) + 6 * spread(log(loss), 200)',
        'the loss leapt far above its trailing median',
    ),
)
"""In the order of gravity: where several fire, the first of them is what the run is said to suffer from."""


PASSING = {'stop': ('spike',), 'rewind': ('spike', 'stall')}
"""What a run doesn't end or go back for: most spikes recover, and those that don't end as another symptom; and what
stalls would stall again."""


def by_name(kind: str) -> Detector:
    """The detector of a kind. Raises UserError for an unknown one."""
    for detector in DETECTORS:
        if detector.kind == kind:
            return detector
    raise UserError(f'--symptom: {kind!r} found, one of {", ".join(d.kind for d in DETECTORS)} expected')


def custom(rule: str) -> Detector:
    """A detector of the user's own rule (--when)."""
    return _detector('when', rule, 'your rule holds')


def applicable(columns: Series, detectors: Sequence[Detector] = DETECTORS) -> list[Detector]:
    """Those whose fields the records have: somebody's own step need not have an accuracy."""
    known = columns.keys() | {rule_language.ALL_FINITE}
    return [detector for detector in detectors if detector.rule.fields <= known]


def first(detector: Detector, columns: Series) -> Symptom | None:
    """The first step at which a detector's rule holds."""
    return first_since(detector, columns, 0)


def first_since(detector: Detector, columns: Series, since: int) -> Symptom | None:
    """The first step, `since` or later, at which a detector's rule holds."""
    steps = columns[rule_language.STEP][rule_language.holds(detector.rule, columns)]
    steps = steps[steps >= since]
    return Symptom(detector.kind, int(steps[0])) if steps.size else None


def symptoms(columns: Series, detectors: Sequence[Detector] = DETECTORS) -> list[Symptom]:
    """The first of every kind that shows, gravest first."""
    if not columns:
        return []
    found = (first(detector, columns) for detector in applicable(columns, detectors))
    return [symptom for symptom in found if symptom is not None]


class Alarm(NamedTuple):
    """A signal whose alarm went on, and stayed on until a symptom."""

    signal: str
    step: int


def alarms_of(table: Sequence[Signal]) -> tuple[Detector, ...]:
    """The alarms of signals; of those that have one."""
    return tuple(_detector(signal.name, signal.alarm, signal.means) for signal in table if signal.alarm)


ALARMS = alarms_of(signals.SIGNALS)
"""Those of an optimiser, which anybody's run may have."""

HYSTERESIS = 16
"""Records for which an alarm may fall silent and still count as on: as long as the windows that smooth it."""


def onset(columns: Series, symptom: Symptom, warnings: Sequence[Detector] = ALARMS) -> Alarm | None:
    """The alarm that was on for the longest time before a symptom, without a break until then."""
    found = onsets(columns, symptom, warnings)
    return min(found, key=lambda warned: warned.step, default=None)


def onsets(columns: Series, symptom: Symptom, warnings: Sequence[Detector] = ALARMS) -> list[Alarm]:
    """Every alarm that was on before a symptom, with the step it went on at; those alone whose fields the records
    have. A record without a finite number for the alarm, such as one that is measured now and then, is passed over.
    """
    if not columns:
        return []
    before = columns[rule_language.STEP] < symptom.step
    columns = {name: values[before] for name, values in columns.items()}
    found = ((w.kind, _went_on(w.rule, columns)) for w in applicable(columns, warnings))
    return [Alarm(name, step) for name, step in found if step is not None]


def _went_on(rule: Rule, columns: Series) -> int | None:
    """The first step of the stretch, with short breaks, in which a rule holds at the records' end."""
    known = np.logical_and.reduce([np.isfinite(columns[field]) for field in rule.fields])
    places = np.flatnonzero(rule_language.holds(rule, columns)[known])
    if not places.size or known.sum() - places[-1] - 1 > HYSTERESIS:
        return None
    breaks = np.flatnonzero(np.diff(places) - 1 > HYSTERESIS)
    start = places[breaks[-1] + 1] if breaks.size else places[0]
    return int(columns[rule_language.STEP][known][start])


def began(detector: Detector, columns: Series, symptom: Symptom) -> int:
    """The step from which on the state that a detector waited for lasted until its symptom; that of the symptom
    itself for one that doesn't wait, and without records of it."""
    if detector.lasting is None or not columns or not detector.lasting.fields <= columns.keys():
        return symptom.step
    until = columns[rule_language.STEP] <= symptom.step
    steps, held = columns[rule_language.STEP][until], rule_language.holds(detector.lasting, columns)[until]
    broken = np.flatnonzero(~held)
    first = broken[-1] + 1 if broken.size else 0
    return int(steps[first]) if first < steps.size else symptom.step


class Watch:
    """Detects while a run goes on: looks at its rows every few steps, seeing what `symptoms` would.

    Args:
        every: steps between looks.
        detectors: those whose rules look back far are asked more rarely, as each look goes through as many rows.
    """

    def __init__(self, every: int = 25, detectors: Sequence[Detector] = DETECTORS):
        self._rows: deque[Row] = deque(maxlen=max(_rows_needed(d, every) for d in detectors))
        self._every, self._detectors = every, detectors

    def __call__(self, row: Row) -> list[Symptom]:
        """Takes the next row; returns the symptoms that began since the last look, gravest first."""
        self._rows.append(row)
        bad = not all(value for name, value in row.items() if name.startswith('finite_'))
        step = row[rule_language.STEP]
        due = [d for d in self._detectors if bad or not (step + 1) % _pace(d, self._every)]
        if not due:
            return []
        needed = max(_rows_needed(d, self._every) for d in due)
        columns = series(itertools.islice(self._rows, max(len(self._rows) - needed, 0), None))
        found = (first_since(d, columns, step - _pace(d, self._every) + 1) for d in applicable(columns, due))
        return [symptom for symptom in found if symptom is not None]


def _pace(detector: Detector, every: int) -> int:
    """Steps between looks."""
    return every * max(detector.rule.lookback // (8 * every), 1)


def _rows_needed(detector: Detector, every: int) -> int:
    return detector.rule.lookback + _pace(detector, every)
