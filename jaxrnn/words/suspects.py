"""Which remedies are tried on a run, the first suspected first: its facts, and remedies as changes of it."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxrnn.bisect.replay import Replayer, Subject
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment import Change, Window
from jaxrnn.optim import curvature
from jaxrnn.record.records import series
from jaxrnn.types import Array, Tree
from jaxrnn.words import remedies, train
from jaxrnn.words.data import Batch
from jaxrnn.words.run import LoadedRun
from jaxrnn.words.signals import SIGNALS


class Suspects:
    """Remedies as changes of a run.

    Args:
        opened: the run.
        subject: the same, as the debugger has it.
        detectors: what is looked for: where their rules read signals, changed steps record these, too.
        make_program: what the changed configurations are made into.
    """

    def __init__(
        self,
        opened: LoadedRun,
        subject: Subject,
        detectors: Sequence[Detector],
        make_program: train.MakeProgram = train.make_program,
    ):
        self.by_name: dict[str, remedies.Remedy] = {}
        self._opened, self._subject, self._make_program = opened, subject, make_program
        read = frozenset().union(*(detector.rule.fields for detector in detectors))
        self._at = 0
        self._signals = bool(read & {signal.name for signal in SIGNALS})

    def changes(self, symptom: Symptom, window: Window) -> list[Change]:
        """Those that may avert a symptom."""
        self._at = window.start
        before = self._opened.records.between(0, symptom.step)
        sharpness = _sharpness(window.start, self._opened, self._subject)
        facts = remedies.Facts(symptom.kind, window.lasting, series(before), sharpness)
        return [self._change(each) for each in remedies.suspects(self._opened.config, facts)]

    def combined(self, change: Change) -> Change | None:
        """A change together with a shorter, decaying rate (see `remedies.combined`); None where there is no such."""
        known = self.by_name.get(change.name)
        found = None if known is None else remedies.combined(self._opened.config, known)
        return None if found is None else self._change(found)

    def _change(self, remedy: remedies.Remedy) -> Change:
        self.by_name[remedy.name] = remedy
        config, dataset = self._opened.config, self._opened.dataset
        return remedies.change(
            config, dataset, remedy, self._make_program, signals=self._signals, at=self._at
        )


SHARPENED = 10
"""Iterations by which the sharpness is found: within a tenth, from below, on the networks of the tests."""


def _sharpness(step: int, opened: LoadedRun, subject: Subject) -> float | None:
    """λmax of the Hessian of the loss, on the batch of a step; None of a program that isn't jaxrnn's own, and where it
    isn't a number above 0."""
    state, batch = Replayer(subject).state(step), opened.program.batch_at(step)
    if not (isinstance(state, train.TrainState) and isinstance(batch, Batch)):
        return None

    @jax.jit
    def measure(params: Tree, batch: Batch) -> Array:
        def loss_of(params: Tree) -> Array:
            return train.loss_of(opened.program.predict, params, batch)[0]

        start = curvature.random_start(params)
        return curvature.sharpness(loss_of, params, start, iterations=SHARPENED).eigenvalue

    found = float(measure(state.params, batch))
    return found if np.isfinite(found) and found > 0 else None
