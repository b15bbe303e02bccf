"""The steps before a symptom again, each time under one change: which change averts it, and so its cause.

outcome      a change, and what became of the symptom       window    which steps are replayed
changes      changes that anybody's run can be given        replays   steps replayed under one change
engine       experiments on one symptom, within a budget    verdict   what replayed records say
strategies   what to try next                               cause     what the outcomes say together
explain      from a bisect's diagnosis to the cause         cache     outcomes kept with a run
mechanisms   what makes a run break, by name
"""

import os
from collections.abc import Callable, Sequence

from jaxrnn import detect
from jaxrnn.bisect import detectors_of, inspection, replay, subject_of
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.experiment.changes import of_anybody
from jaxrnn.experiment.engine import BUDGET, Experiments
from jaxrnn.experiment.explain import explain
from jaxrnn.experiment.mechanisms import Mechanism
from jaxrnn.experiment.outcome import Change, Changed, ExperimentReport
from jaxrnn.experiment.window import Window, window_of
from jaxrnn.types import BatchAt, Step, Tree

__all__ = [
    'BUDGET',
    'Change',
    'Changed',
    'ExperimentReport',
    'Experiments',
    'Mechanism',
    'Window',
    'diagnose',
    'explain',
    'window_of',
]


def diagnose(
    step: Step,
    batch_at: BatchAt | None,
    directory: str | os.PathLike,
    changes: Sequence[Change] = (),
    *,
    budget: int | None = None,
    like: Tree | Callable[[], Tree] = None,
    when: str = '',
    symptom: str = '',
    good: int | None = None,
    bad: int | None = None,
    digest_every: int = 1,
    alarms: Sequence[detect.Detector] | None = None,
    loss: str = '',
    batch_like: Tree = None,
) -> tuple[Diagnosis, ExperimentReport | None]:
    """As `bisect`, and experiments: the steps before the symptom again under one change at a time.

    Args:
        step, batch_at, directory: as in `bisect`.
        changes: what is tried, in this order, beside what any step can be given: shorter steps, other batches, float64;
            see `Change`. One that can't be made, traced or run is an outcome of its own, 'not possible: why'.
        budget: steps that may be replayed, those of the bisection included; if not given, see `engine.budget_for`.
        like, when, symptom, good, bad, digest_every, alarms, loss, batch_like: as in `bisect`.

    Returns:
        The diagnosis with cause and remedies, and what the experiments gave, None where there was nothing to explain.

    Raises:
        UserError: as `bisect`.

    >>> import tempfile
    >>> import numpy as np
    >>> def batch_at(k):
    ...     return np.float32(0)
    >>> def growing(rate):
    ...     return lambda x, batch: (x * rate, {'loss': x})
    >>> slower = Change('slower', 'optimiser', lambda: Changed(growing(1.01), batch_at), '--rate=1.01')
    >>> run = growing(1.1), batch_at
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = jaxrnn.record(*run, lambda: 1.0, directory, max_steps=100)
    ...     diagnosis, _ = jaxrnn.diagnose(*run, directory, [slower], like=lambda: 1.0, when='loss > 100')
    >>> diagnosis.first_bad_step, diagnosis.cause.kind, diagnosis.remedies[0]['flags']
    (49, 'optimiser', '--rate=1.01')
    """
    detectors = detectors_of(when, symptom)
    subject = subject_of(step, batch_at, directory, like, digest_every, loss, batch_like)
    alarms = detect.ALARMS if alarms is None else alarms
    diagnosis, _ = replay.bisect(subject, detectors, good=good, bad=bad, alarms=alarms)
    diagnosis, inspected = inspection.locate(subject, diagnosis)
    diagnosis = inspection.with_numbers(subject, diagnosis)

    def tried(window: Window, bad_batches: Sequence[int]) -> list[Change]:
        assert diagnosis.symptom is not None
        began = replay.began_of(subject, diagnosis, detectors)
        return of_anybody(subject, diagnosis.symptom, window, bad_batches, changes, began)

    diagnosis, report = explain(subject, diagnosis, tried, detectors, budget=budget)
    return diagnosis, report and report._replace(inspected=inspected)
