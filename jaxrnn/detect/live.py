"""What `course` says of a run when it is over, as far as it can be said while the run goes on."""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrnn.detect.course import SHORT, SMOOTHED, still_as_good
from jaxrnn.detect.detectors import Alarm, Detector, stretch
from jaxrnn.diagnosis import Symptom
from jaxrnn.types import Series

LASTS = 24
"""Steps for which an alarm must have been on, with short breaks, to be a sign: one batch can raise it, and what smooths
it keeps it on for 16. On the demo's run that is told 17 steps before the collapse."""

LEVEL = 64
"""Losses before a leap of which its level is known."""


def lasting_alarm(found: Sequence[Symptom], columns: Series, alarms: Mapping[str, Detector]) -> Alarm | None:
    """The alarm that has been on for the longest time, if one has been on for long enough to be a sign.

    Args:
        found: the alarms that were on since a watch looked last.
        columns: of the watch, up to now.
        alarms: by name.
    """
    signs = []
    for seen in found:
        steps = stretch(alarms[seen.kind].rule, columns)
        if steps is not None and steps[1] - steps[0] + 1 >= LASTS:
            signs.append(Alarm(seen.kind, steps[0]))
    return min(signs, key=lambda alarm: alarm.step, default=None)


class SpikeFilter:
    """Holds back leaps of the loss until it is seen that they aren't gone at once, as most are.

    Args:
        every: steps between the looks that find them, at most.
    """

    def __init__(self, every: int):
        self._losses: deque[tuple[int, float]] = deque(maxlen=LEVEL + every + SHORT + SMOOTHED)
        self._held: list[Symptom] = []

    def begin(self, rows: Sequence[tuple[int, float]]) -> None:
        """Takes the steps and losses before the next row."""
        self._held = []
        self._losses.clear()
        self._losses.extend(rows[-(self._losses.maxlen or 0) :])

    def __call__(self, step: int, loss: float, found: Sequence[Symptom]) -> list[Symptom]:
        """Takes the next step, and what was found in it; what of this, and of what was held back, has lasted."""
        self._losses.append((step, loss))
        if not found and not self._held:
            return []
        self._held += [symptom for symptom in found if symptom.kind == 'spike']
        known = [spike for spike in self._held if step >= spike.step + SHORT + SMOOTHED - 1]
        self._held = [spike for spike in self._held if spike not in known]
        lasting = [spike for spike in known if self._lasts(spike)]
        return [*(symptom for symptom in found if symptom.kind != 'spike'), *lasting]

    def at(self, step: int) -> float | None:
        """The loss of a step, if it is still known."""
        return next((loss for number, loss in self._losses if number == step), None)

    def _lasts(self, spike: Symptom) -> bool:
        steps, losses = map(np.array, zip(*self._losses, strict=True))
        limit = still_as_good(losses[steps < spike.step])
        after = losses[(steps >= spike.step + SHORT) & (steps < spike.step + SHORT + SMOOTHED)]
        return limit is not None and bool(after.size) and not float(np.median(after)) <= limit
