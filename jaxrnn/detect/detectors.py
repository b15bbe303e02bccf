"""Records -> symptoms, by rules over the records alone.

A detector is a named rule (`rule_language`), such as that for a collapse: what the user could have typed after --when.
A new one is one entry of DETECTORS.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn.detect import rule_language
from jaxrnn.detect.rule_language import Rule
from jaxrnn.diagnosis import Symptom
from jaxrnn.optim import signals
from jaxrnn.record.records import MISSING, Records, Row, is_missing, series
from jaxrnn.types import Series, Signal, UserError


class Detector(NamedTuple):
    """What one kind of symptom looks like in the records."""

    kind: str
    rule: Rule
    means: str  # what it usually means, for a person
    lasting: Rule | None = None  # the state that the rule waits for, where it waits before it says so


def _detector(kind: str, rule: str, means: str, lasting: str = '') -> Detector:
    return Detector(kind, rule_language.parse(rule), means, rule_language.parse(lasting) if lasting else None)


LATE = 'step >= 1400 and '
FLAT = 'median(loss, 400) > .99 * prev(median(loss, 400), 800)'
# What is quickly known first: the rest is asked where that holds.
STALLED = 'smooth(cosine, 200) < .5 and ' + FLAT
UNLEARNT = (
    'first(loss) > 0 and max(loss, 400) > .9 * first(loss) and median(loss, 400) > .9 * first(loss) and '
    + FLAT
)

NOTHING_MOVES = 'max(state_moved, 16) == 0 and state_moved == 0'
NO_GRADIENT = 'min(moments_fading, 16) == 1 and moments_fading == 1'

# Some tensors don't move any more, and all did, while the others go on at a fiftieth of the first step's pace or more:
# at the end of a schedule, or of a convergence, they don't.
PART_STILL = (
    'first(state_still) == 0 and min(state_still, 64) > 0 and state_still > 0'
    ' and median(state_moved, 64) > .02 * first(state_moved)'
    ' and median(loss, 16) > 1.2 * min(median(loss, 16), 1000) and min(median(loss, 16), 1000) > 0'
)

# The level of 32 losses is five times as high as it was, and four standard deviations of what batches scatter; half of
# the first loss had been learnt, and it isn't all but zero yet.
NOW, BEST = 'median(log(loss), 32)', 'min(median(log(loss), 32), 1000)'
RELAPSED = (
    f'first(loss) > 0 and {NOW} > {BEST} + log(5) and {BEST} < log(first(loss)) + log(.5)'
    f' and {NOW} > log(first(loss)) + log(.03)'
    f' and {NOW} > {BEST} + 2.8 * spread(log(loss) - prev(log(loss), 1), 64)'
)

MEANS = {
    'nonfinite': 'a NaN or an infinity appeared in the loss, the gradients, the update or the state',
    'dead': 'every gradient is exactly zero, or nothing moves, or some of it, and the loss is not at its best',
    'collapse': 'the network lost what it had learnt',
    'stall': 'the loss no longer falls, though little has been learnt',
}

DETECTORS = (
    # What a record has beside the loss may be a NaN without harm.
    _detector('nonfinite', 'not finite(loss) or not sound', MEANS['nonfinite']),
    _detector('nonfinite', 'not sound', MEANS['nonfinite']),
    _detector('dead', f'{NOTHING_MOVES} or {NO_GRADIENT} or {PART_STILL}', MEANS['dead']),
    _detector('dead', f'{NOTHING_MOVES} or {NO_GRADIENT}', MEANS['dead']),
    _detector('dead', f'{NOTHING_MOVES} or {PART_STILL}', MEANS['dead']),
    _detector('dead', NOTHING_MOVES, MEANS['dead']),
    # Sudden: below the best of the last 200 steps by a quarter, by .1, and by 8 standard errors of a mean of
    # 16 steps, so that small batches, whose accuracy is noisy, raise no alarm.
    _detector(
        'collapse',
        'smooth(accuracy, 16) < .75 * max(smooth(accuracy, 16), 200)'
        ' and smooth(accuracy, 16) < max(smooth(accuracy, 16), 200) - .1'
        ' and smooth(accuracy, 16) < max(smooth(accuracy, 16), 200) - 2 * std(accuracy, 200)',
        MEANS['collapse'],
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
    # predicts the targets' direction by half has learnt something: such a loss has converged. Without a cosine, who
    # has a tenth less loss than at first.
    _detector('stall', LATE + STALLED, MEANS['stall'], lasting=STALLED),
    _detector('stall', LATE + UNLEARNT, MEANS['stall'], lasting=UNLEARNT),
    # Three times the trailing median is what a reader calls a spike; six standard deviations keep out noise, of the
    # logarithm, since a loss scatters by factors. While a loss falls, its median of 200 steps lies far above it, and
    # its spread is the fall's: then three times where a line through the last 64 leads to, and six of their standard
    # deviations about that line; and a rise, which the bend of a curve is not. However losses scatter: worse than
    # before the first step, and five times as high as any of the last 64; or twice as bad as that, among batches with
    # hardly a loss and others with a large one, as where steps are far too long. Among the first steps, a hundred
    # times.
    _detector(
        'spike',
        'finite(loss) and ('
        'loss > 3 * median(loss, 200) and log(loss) > median(log(loss), 200) + 6 * spread(log(loss), 200)'
        ' or log(loss) > trend(log(loss), 64) + log(3)'
        ' and log(loss) > trend(log(loss), 64) + 6 * scatter(log(loss), 64) and loss > 2 * max(loss, 5)'
        ' or first(loss) > 0 and loss > first(loss) and loss > 5 * max(loss, 64)'
        ' or first(loss) > 0 and loss > 2 * first(loss) and median(loss, 64) < .1 * first(loss)'
        ' and std(loss, 64) > .5 * first(loss)'
        ' or step < 24 and first(loss) > 0 and loss > 100 * first(loss) and loss > 100 * max(loss, 2)'
        ' or min(loss, 200) <= 0 and loss > 10 * max(abs(loss), 200)'
        ' and loss > median(loss, 200) + 30 * spread(loss, 200))',
        'the loss leapt far above its trailing median',
    ),
    # Worse than before the first step, by a fifth and by four standard deviations of what batches scatter: of the
    # difference of two neighbours √2 of one, whatever the trend. Who comes back from there was not lost, as `course`
    # says.
    _detector(
        'diverged',
        'first(loss) > 0 and loss > first(loss) and median(log(loss), 64) > log(first(loss)) + log(1.2)'
        ' and median(log(loss), 64) > log(first(loss)) + 2.8 * spread(log(loss) - prev(log(loss), 1), 64)',
        'the loss is worse than before the first step, and stays so',
        lasting='loss > 1.1 * first(loss)',
    ),
    # Without an accuracy, after what has a step of its own.
    _detector('collapse', RELAPSED, MEANS['collapse']),
)
"""In the order of gravity: where several kinds show, the first of them is what the run is said to suffer from. Of
several of a kind the first counts whose fields the run has."""


PASSING = {'stop': ('spike',), 'rewind': ('spike', 'stall', 'dead')}
"""What a run doesn't end or go back for: most spikes recover, and those that don't end as another symptom; and what
stalls would stall again."""


LASTING = ('constant', 'stall')
"""Kinds of a state that sets in long before its rule reports it."""


def by_name(kind: str) -> Detector:
    """The first detector of a kind. Raises UserError for an unknown one."""
    return named(kind)[0]


def named(kind: str) -> list[Detector]:
    """Those of a kind. Raises UserError for an unknown one."""
    found = [detector for detector in DETECTORS if detector.kind == kind]
    if not found:
        kinds = ', '.join(dict.fromkeys(d.kind for d in DETECTORS))
        raise UserError(f'--symptom: {kind!r} found, one of {kinds} expected')
    return found


WHEN = 'when'


def custom(rule: str) -> Detector:
    """A detector of the user's own rule (--when)."""
    return _detector(WHEN, rule, 'your rule holds')


def bound(detectors: Sequence[Detector], columns: Series, loss: str | None = 'loss') -> list[Detector]:
    """Detectors for one run, one of each kind: with the run's own name of the loss, and its first loss as a number.

    Args:
        detectors: in the order of gravity.
        columns: of the run, from its first record on.
        loss: what the run calls its loss; None where that isn't known.

    Raises:
        UserError: a rule of the user's own asks for a field that the records don't have.
    """
    made = with_numbers(detectors, columns, loss)
    known = _known(columns)
    for detector in made:
        if detector.kind == WHEN and (missing := sorted(detector.rule.fields - known)):
            raise rule_language.unknown_field(missing[0], columns)
    return applicable(columns, made)


def with_numbers(detectors: Sequence[Detector], columns: Series, loss: str | None = 'loss') -> list[Detector]:
    """As `bound`, of all of them, whatever fields they need."""
    names = {} if loss is None or 'loss' in columns else {'loss': loss}

    def for_run(rule: Rule | None) -> Rule | None:
        return None if rule is None else rule_language.bind(rule, names, columns)

    return [d._replace(rule=for_run(d.rule) or d.rule, lasting=for_run(d.lasting)) for d in detectors]


def applicable(columns: Series, detectors: Sequence[Detector] = DETECTORS) -> list[Detector]:
    """Of each kind the first whose fields the records have: somebody's own step need not have an accuracy."""
    known = _known(columns)
    found: dict[str, Detector] = {}
    for detector in detectors:
        if detector.rule.fields <= known:
            found.setdefault(detector.kind, detector)
    return list(found.values())


def unjudged(columns: Series, detectors: Sequence[Detector] = DETECTORS) -> dict[str, list[str]]:
    """The kinds that can't be looked for, each with the fields that it would need."""
    seen = {detector.kind for detector in applicable(columns, detectors)}
    missing: dict[str, list[str]] = {}
    for detector in detectors:
        if detector.kind not in seen:
            fields = {field for field in detector.rule.fields if '(' not in field}
            missing.setdefault(detector.kind, sorted(fields - _known(columns)))
    return missing


def _known(columns: Series) -> frozenset[str]:
    return frozenset(columns) | {rule_language.ALL_FINITE, rule_language.SOUND}


def first(detector: Detector, columns: Series) -> Symptom | None:
    """The first step at which a detector's rule holds."""
    return first_since(with_numbers([detector], columns)[0], columns, 0)


def first_since(detector: Detector, columns: Series, since: int) -> Symptom | None:
    """The first step, `since` or later, at which a detector's rule holds."""
    steps = columns[rule_language.STEP]
    place = int(np.searchsorted(steps, since))
    steps = steps[place:][rule_language.holds(detector.rule, columns, place)[place:]]
    return Symptom(detector.kind, int(steps[0])) if steps.size else None


def symptoms(columns: Series, detectors: Sequence[Detector] = DETECTORS) -> list[Symptom]:
    """The first of every kind whose rule holds, gravest first; whatever became of it (see `course.judged`)."""
    if not columns:
        return []
    found = (first(detector, columns) for detector in bound(detectors, columns))
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
    found = ((w.kind, stretch(w.rule, columns)) for w in applicable(columns, warnings))
    return [Alarm(name, steps[0]) for name, steps in found if steps is not None]


def stretch(rule: Rule, columns: Series) -> tuple[int, int] | None:
    """The first and the last step of the stretch, with short breaks, in which a rule holds at the records' end."""
    known = np.logical_and.reduce([np.isfinite(columns[field]) for field in rule.fields])
    places = np.flatnonzero(rule_language.holds(rule, columns)[known])
    if not places.size or known.sum() - places[-1] - 1 > HYSTERESIS:
        return None
    breaks = np.flatnonzero(np.diff(places) - 1 > HYSTERESIS)
    start = places[breaks[-1] + 1] if breaks.size else places[0]
    steps = columns[rule_language.STEP][known]
    return int(steps[start]), int(steps[places[-1]])


class Watch:
    """Detects while a run goes on: looks at its rows every few steps, seeing what `symptoms` would.

    Args:
        every: steps between looks.
        detectors: those whose rules look back far are asked more rarely, as each look goes through as many rows.
        loss: what the run calls its loss; None where that isn't known.
    """

    def __init__(self, every: int = 25, detectors: Sequence[Detector] = DETECTORS, loss: str | None = 'loss'):
        self._loss = loss
        self._most = max((d.rule.lookback + _pace(d, every) for d in detectors), default=0)
        self._every, self._detectors = every, detectors
        self._paces: list[int] = []
        self._new: list[Row] = []  # since the last look
        self._columns: Series = {}  # of the rows before them, no more than are looked back to
        self._bind({})

    def see_all(self, records: Records) -> list[Symptom]:
        """Takes the rows of a run that is continued, from its first on; returns the symptoms that began in them, the
        earliest first."""
        if not records:
            return []
        columns = records.columns
        self._bind(columns)
        self._new, self._columns = [], _last(columns, self._most)
        found = (first_since(d, columns, 0) for d in applicable(columns, self._detectors))
        return sorted(filter(None, found), key=lambda symptom: symptom.step)

    def __call__(self, row: Row) -> list[Symptom]:
        """Takes the next row; returns the symptoms that began since the last look, gravest first."""
        if not self._new and not self._columns:
            self._bind(series([row]))
        self._new.append(row)
        step, bad = row[rule_language.STEP], not _is_good(row, self._loss)
        if not bad and (step + 1) % self._every:  # every pace is a multiple of it
            return []
        paces = zip(self._detectors, self._paces, strict=True)
        due = [detector for detector, pace in paces if bad or not (step + 1) % pace]
        return self._found(step, due)

    def look(self) -> list[Symptom]:
        """What began in the last steps, as if every detector were asked now: some may have been returned already."""
        if not self._new and not self._columns:
            return []
        return self._found(int(self._taken()[rule_language.STEP][-1]), self._detectors)

    @property
    def columns(self) -> Series:
        """Of the last rows up to the last look, as many as rules look back to."""
        return self._columns

    def _found(self, step: int, due: Sequence[Detector]) -> list[Symptom]:
        columns = self._taken()
        found = (first_since(d, columns, step - _pace(d, self._every) + 1) for d in applicable(columns, due))
        return [symptom for symptom in found if symptom is not None]

    def _bind(self, columns: Series) -> None:
        self._detectors = with_numbers(self._detectors, columns, self._loss)
        self._paces = [_pace(detector, self._every) for detector in self._detectors]

    def _taken(self) -> Series:
        """All columns that are looked back to, the new rows with them."""
        if not self._new:
            return self._columns
        before, new = self._columns, series(self._new)
        size = before[rule_language.STEP].size if before else 0
        kept = min(size, max(self._most - len(self._new), 0))
        joined = {
            name: np.concatenate([_part(before, name, size)[size - kept :], _part(new, name, len(self._new))])
            for name in dict.fromkeys([*before, *new])
        }
        self._columns = {n: v for n, v in _last(joined, self._most).items() if not is_missing(v).all()}
        self._new = []
        return self._columns


def _is_good(row: Row, loss: str | None) -> bool:
    """Whether all flags are set, and the loss is finite: of a step that --debug_nans ended there are no flags."""
    for name, value in row.items():
        if not value and name.startswith('finite_'):
            return False
    return loss is None or math.isfinite(row.get(loss, 0.0))


def _part(columns: Series, name: str, size: int) -> np.ndarray:
    return columns[name] if name in columns else np.full(size, MISSING)


def _last(columns: Series, most: int) -> dict[str, np.ndarray]:
    return {name: values[-most:] for name, values in columns.items()} if most else {}


def _pace(detector: Detector, every: int) -> int:
    """Steps between looks."""
    return every * max(detector.rule.lookback // (8 * every), 1)
