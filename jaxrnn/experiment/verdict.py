"""What the records of replayed steps say: whether the symptom showed, when, and whether a change did anything."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn import detect
from jaxrnn.detect import Detector, rule_language
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment.changes import NUDGE
from jaxrnn.experiment.outcome import AVERTED, DELAYED, UNCHANGED, WORSE
from jaxrnn.experiment.window import Window
from jaxrnn.record import telemetry
from jaxrnn.record.records import Row, series, sound
from jaxrnn.types import Series

SHIFT, SHIFTED = 10, 0.1
"""A symptom comes earlier or later if by so many steps, and by this share of those since the start."""

SETTLED = 16
"""Last steps over which a loss is averaged."""

EFFECT = 10
"""Times that a change must move a loss farther than a nudge does to count as having an effect: other roundings, of
another compilation, move it about as far as a nudge."""


STAYS = 16
"""Steps after a rule held for which a replay goes on, so that it is seen whether what showed passes."""


class Found(NamedTuple):
    """What the records of a change say."""

    symptom: Symptom | None
    verdict: str  # of VERDICTS


class SymptomJudge(NamedTuple):
    """Judges records against one symptom of a run: a change averts it if what follows is a training that goes on, with
    no symptom of any kind and a loss that is no worse than before the symptom began."""

    symptom: Symptom
    own: Detector  # of the symptom
    detectors: tuple[Detector, ...]  # those that count, gravest first
    window: Window
    loss: str | None  # what the records call it
    before: (
        float | None
    )  # the loss before the symptom began, with what batches scatter; None where it isn't asked
    at_end: float | None = None  # the run's own loss at the horizon

    @property
    def lookback(self) -> int:
        """Steps before a step that the rules read."""
        return max(detector.rule.lookback for detector in self.detectors)

    def shows(self, rows: Sequence[Row]) -> bool:
        """Whether the symptom's own rule holds where the run had it: of steps as they were."""
        columns = _columns(rows)
        if self.window.lasting:
            return self._lasts(columns)
        steps = columns[rule_language.STEP]
        held = rule_language.holds(self.own.rule, columns)
        return bool(held[steps == self.symptom.step].any())

    def ended(self, rows: Sequence[Row], since: int) -> bool:
        """Whether something showed that will not pass, or would have by now."""
        found = self._first(rows, since)
        return found is not None and (
            not self._may_pass(found, rows[-1]) or rows[-1]['step'] - found.step >= STAYS
        )

    def found(self, rows: Sequence[Row], since: int) -> Found:
        """What became of the symptom from a step on."""
        found = self._first(rows, since)
        if found is None and self.window.lasting and self._lasts(_columns(rows)):
            return Found(Symptom(self.own.kind, rows[-1]['step']), UNCHANGED)
        return Found(found, self._verdict(found, final_loss(rows, self.loss)))

    def _first(self, rows: Sequence[Row], since: int) -> Symptom | None:
        """The gravest symptom from a step on. A state that lasts isn't looked for: it is judged at the end."""
        at_once = [d for d in self.detectors if not (self.window.lasting and d.kind == self.own.kind)]
        columns = _columns(rows)
        found = detect.judged(columns, detect.applicable(columns, at_once), self.loss, good=since - 1)
        event = found.event
        if event is not None and event.kind == 'spike' != self.symptom.kind and event.back is not None:
            # What averts another symptom may bear a batch at the cost of its own loss.
            return found.symptom if event.back - event.step > detect.SHORT else None
        return found.symptom

    def _may_pass(self, found: Symptom, last: Row) -> bool:
        return found.kind in PASSES and bool(last.get(telemetry.FINITE_STATE, True))

    def _lasts(self, columns: Series) -> bool:
        assert self.own.lasting is not None
        return bool(rule_language.holds(self.own.lasting, columns)[-1])

    def _verdict(self, found: Symptom | None, loss: float) -> str:
        if found is None:
            if self.before is None or not loss > self.before:
                return AVERTED
            return DELAYED if self.at_end is not None and loss < self.at_end / 2 else UNCHANGED
        if found.kind == NONFINITE and self.symptom.kind != NONFINITE:
            return WORSE
        if found.kind != self.symptom.kind and detect.WHEN in (found.kind, self.symptom.kind):
            return WORSE
        if self.window.lasting:
            return UNCHANGED
        shift = max(SHIFT, SHIFTED * (self.symptom.step - self.window.start))
        if abs(found.step - self.symptom.step) <= shift:
            return UNCHANGED
        return DELAYED if found.step > self.symptom.step else WORSE


NONFINITE = 'nonfinite'
PASSES = (NONFINITE, 'spike', 'diverged', 'dead')
"""Kinds that a run may get over within some steps."""


def judge_of(
    columns: Series,
    loss: str | None,
    symptom: Symptom,
    detectors: Sequence[Detector],
    window: Window,
    began: int | None = None,
) -> SymptomJudge:
    """The judge of a symptom.

    Args:
        columns: of the run.
        loss: what it calls its loss; None where that isn't known.
        symptom: what it suffers from.
        detectors: what counts as a symptom, gravest first; that of the symptom's kind among them. They are bound to the
            run here.
        window: of the experiments.
        began: when the symptom began, the symptom's own step if not given.
    """
    every = [*detectors, *(d for d in detect.DETECTORS if d.kind not in {each.kind for each in detectors})]
    known = detect.bound(every, columns, loss) if columns else detect.with_numbers(every, {}, loss)
    own = next(detector for detector in known if detector.kind == symptom.kind)
    if symptom.kind == detect.WHEN:
        # What the user's own rule is about may be anything: beside it only that all is finite counts.
        counted = (*(d for d in known if d.kind == NONFINITE), own)
        return SymptomJudge(symptom, own, counted, window, loss, None)
    began = symptom.step if began is None else began
    known = [d for d in known if d.kind in (symptom.kind, NONFINITE) or not _held_before(d, columns, began)]
    before, at_end = _loss_before(columns, loss, began), None
    if columns and loss and loss in columns:
        at_end = _middle(columns[loss][columns[rule_language.STEP] < window.horizon])
    return SymptomJudge(symptom, own, tuple(known), window, loss, before, at_end)


def _held_before(detector: Detector, columns: Series, began: int) -> bool:
    """Whether a run suffered from another symptom already when this one began: no change need avert that, too."""
    if not columns or not detector.rule.fields <= columns.keys() | {
        rule_language.ALL_FINITE,
        rule_language.SOUND,
    }:
        return False
    steps = columns[rule_language.STEP]
    near = (steps < began) & (steps >= began - STAYS)
    return bool(rule_language.holds(detector.rule, columns)[near].any())


def _loss_before(columns: Series, loss: str | None, began: int) -> float | None:
    """The highest loss that is no worse than before a step; None where that isn't known."""
    if not columns or loss is None or loss not in columns:
        return None
    steps, losses = columns[rule_language.STEP], columns[loss]
    earlier = losses[steps < max(began, steps[0] + 1)]
    return detect.still_as_good(earlier)


def _middle(losses: np.ndarray) -> float | None:
    last = losses[-SETTLED:]
    last = last[np.isfinite(last)]
    return float(np.median(last)) if last.size else None


def final_loss(rows: Sequence[Row], loss: str | None = 'loss') -> float:
    """Median of the last SETTLED losses; NaN where there is none, or the very last isn't finite."""
    losses = series(rows[-SETTLED:]).get(loss or '', np.array([np.nan])) if rows else np.array([np.nan])
    return float(np.median(losses)) if np.isfinite(losses).all() else float('nan')


def has_effect(
    rows: Sequence[Row], control: Sequence[Row], nudged: Sequence[Row], loss: str | None = 'loss'
) -> bool:
    """Whether any loss is farther from the control's than EFFECT times what a nudge had moved them by until then. True
    where that is unknown."""
    name = loss or ''
    losses = [{row['step']: row[name] for row in each if name in row} for each in (rows, control, nudged)]
    steps = sorted(set.intersection(*(set(each) for each in losses)))
    if not steps:
        return True
    ours, theirs, moved = (np.array([each[step] for step in steps]) for each in losses)
    with np.errstate(all='ignore'):  # what isn't finite is no evidence
        noise = np.fmax.accumulate(np.fmax(np.abs(moved - theirs), NUDGE * np.abs(theirs)))
        return bool(np.any(np.abs(ours - theirs) > EFFECT * noise))


def stands_out(row: Row, others: Sequence[Row], loss: str | None = 'loss') -> bool:
    """Whether one state does badly on one batch beside what it does on others: its loss isn't finite, or lies above
    theirs by a factor of STANDS_OUT and by six standard deviations of what they scatter."""
    broken = [not _is_finite(other, loss) for other in others]
    if not _is_finite(row, loss):
        return not broken or sum(broken) < len(broken) / 2
    if loss is None or loss not in row:
        return False
    values = np.array([other[loss] for other in others if loss in other], np.float64)
    values = values[np.isfinite(values)]
    if values.size < LEAST_OTHERS:
        return False
    middle = np.median(values)
    scattered = rule_language.GAUSSIAN_MAD * np.median(np.abs(values - middle))
    if (values > 0).all() and row[loss] > 0:
        logs = np.log(values)
        spread = rule_language.GAUSSIAN_MAD * np.median(np.abs(logs - np.median(logs)))
        far = np.log(row[loss]) - np.median(logs) > max(6 * spread, np.log(STANDS_OUT))
        return bool(far and row[loss] > 2 * values.max())
    return bool(row[loss] - middle > 10 * scattered and row[loss] > values.max() + scattered)


def _is_finite(row: Row, loss: str | None) -> bool:
    return sound(row) and bool(np.isfinite(row.get(loss or '', 0.0)))


STANDS_OUT = 3
"""Times the others' median, as a spike is of the steps before it."""

LEAST_OTHERS = 5
"""Other batches beside which one can stand out."""


def outstanding(rows: Sequence[Row], loss: str | None = 'loss') -> list[int]:
    """Steps whose loss or gradient is STANDS_OUT times the median of all, the farthest first; what isn't finite before
    all."""
    columns = series(rows)
    with np.errstate(all='ignore'):  # infinities among them
        ratios = [
            np.nan_to_num(values / max(np.nanmedian(np.abs(values)), 1e-30), nan=np.inf)
            for values in (columns[name] for name in (loss or '', 'gradient_norm') if name in columns)
        ]
    if not ratios:
        return []
    highest = np.max(ratios, axis=0)
    order = np.argsort(-highest, kind='stable')
    return [int(step) for step in columns[rule_language.STEP][order[highest[order] > STANDS_OUT]]]


def _columns(rows: Sequence[Row]) -> Series:
    """Of the fields that the newest row has: a changed step may record fewer than the run that it starts from."""
    return {name: column for name, column in series(rows).items() if name in rows[-1]}
