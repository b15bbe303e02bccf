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
from jaxrnn.record.telemetry import Row
from jaxrnn.types import Series

SHIFT, SHIFTED = 10, 0.1
"""A symptom comes earlier or later if by so many steps, and by this share of those since the start."""

SETTLED = 16
"""Last steps over which a loss is averaged."""

EFFECT = 10
"""Times that a change must move a loss farther than a nudge does to count as having an effect: other roundings, of
another compilation, move it about as far as a nudge."""


class SymptomJudge(NamedTuple):
    """Judges records against one symptom of a run."""

    symptom: Symptom
    own: Detector  # of the symptom
    detectors: tuple[Detector, ...]  # those that count: the symptom's own and graver ones, gravest first
    window: Window

    @property
    def lookback(self) -> int:
        """Steps before a step that the rules read."""
        return max(detector.rule.lookback for detector in self.detectors)

    def first(self, rows: Sequence[Row], since: int) -> Symptom | None:
        """The gravest symptom from a step on. A state that lasts isn't looked for: it is judged at the end."""
        columns = _columns(rows)
        at_once = [d for d in self.detectors if not (self.window.lasting and d.kind == self.own.kind)]
        for detector in detect.applicable(columns, at_once):
            if (found := detect.first_since(detector, columns, since)) is not None:
                return found
        return None

    def found(self, rows: Sequence[Row], since: int) -> Symptom | None:
        """What showed from a step on; of a state that lasts, what holds at the end."""
        found = self.first(rows, since)
        if found is not None or not self.window.lasting:
            return found
        assert self.own.lasting is not None
        holds = rule_language.holds(self.own.lasting, _columns(rows))[-1]
        return Symptom(self.own.kind, rows[-1]['step']) if holds else None

    def verdict(self, found: Symptom | None) -> str:
        """One of VERDICTS."""
        if found is None:
            return AVERTED
        if found.kind != self.symptom.kind:
            return WORSE
        if self.window.lasting:
            return UNCHANGED
        shift = max(SHIFT, SHIFTED * (self.symptom.step - self.window.start))
        if abs(found.step - self.symptom.step) <= shift:
            return UNCHANGED
        return DELAYED if found.step > self.symptom.step else WORSE


def judge_of(symptom: Symptom, detectors: Sequence[Detector], window: Window) -> SymptomJudge:
    """The judge of a symptom.

    Args:
        symptom: what a run suffers from.
        detectors: what counts as a symptom, gravest first; that of the symptom's kind among them.
        window: of the experiments.
    """
    place = [detector.kind for detector in detectors].index(symptom.kind)
    own, nonfinite = detectors[place], detect.by_name('nonfinite')
    # What is less grave may still show, as a small spike where a collapse was averted.
    graver = [detector for detector in detectors[:place] if detector.kind != symptom.kind]
    counted = (nonfinite, *(d for d in (*graver, own) if d.kind != nonfinite.kind))
    return SymptomJudge(symptom, own, counted, window)


def final_loss(rows: Sequence[Row]) -> float:
    """Mean of the last SETTLED losses; NaN where there is none, or one isn't finite."""
    return float(np.mean(telemetry.series(rows[-SETTLED:]).get('loss', np.array([np.nan]))))


def has_effect(rows: Sequence[Row], control: Sequence[Row], nudged: Sequence[Row]) -> bool:
    """Whether any loss is farther from the control's than EFFECT times what a nudge had moved them by until then. True
    where that is unknown."""
    losses = [{row['step']: row['loss'] for row in each if 'loss' in row} for each in (rows, control, nudged)]
    steps = sorted(set.intersection(*(set(each) for each in losses)))
    if not steps:
        return True
    ours, theirs, moved = (np.array([each[step] for step in steps]) for each in losses)
    with np.errstate(all='ignore'):  # what isn't finite is no evidence
        noise = np.fmax.accumulate(np.fmax(np.abs(moved - theirs), NUDGE * np.abs(theirs)))
        return bool(np.any(np.abs(ours - theirs) > EFFECT * noise))


def is_spike(row: Row, before: Sequence[Row]) -> bool:
    """Whether a step's record isn't finite, or is a spike against earlier ones; without these the former alone.

    Args:
        row: of the step, under any number.
        before: records of the run before it.
    """
    if not rule_language.all_finite(telemetry.series([row]))[0]:
        return True
    spike = detect.by_name('spike')
    near = [old for old in before if 0 < row['step'] - old['step'] <= spike.rule.lookback]
    columns = telemetry.series([*near, row])
    return (
        bool(detect.applicable(columns, [spike]))
        and detect.first_since(spike, columns, row['step']) is not None
    )


def outstanding(rows: Sequence[Row]) -> list[int]:
    """Steps by how far their loss or gradient is above the median of all, the farthest first; what isn't finite before
    all."""
    columns = telemetry.series(rows)
    with np.errstate(all='ignore'):  # infinities among them
        ratios = [
            np.nan_to_num(values / max(np.nanmedian(values), 1e-30), nan=np.inf)
            for values in (columns[name] for name in ('loss', 'gradient_norm') if name in columns)
        ]
    if not ratios:
        return []
    order = np.argsort(-np.max(ratios, axis=0), kind='stable')
    return [int(step) for step in columns[rule_language.STEP][order]]


def _columns(rows: Sequence[Row]) -> Series:
    """Of the fields that the newest row has: a changed step may record fewer than the run that it starts from."""
    return {name: column for name, column in telemetry.series(rows).items() if name in rows[-1]}
