"""Tells somebody else that a training goes wrong, while it goes on: a command, a function, a file.

commands    the command that is run       told    what was told already
"""

import datetime
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jaxrnn import detect
from jaxrnn.alerts.commands import Command, Runner
from jaxrnn.alerts.told import SIGN, SYMPTOM, Told
from jaxrnn.diagnosis import Symptom
from jaxrnn.record import layout
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import STEP, Records, Row
from jaxrnn.types import Series, UserError

log = logging.getLogger('jaxrnn')

Alert = Mapping[str, Any]
"""time (ISO 8601, UTC), run (its directory), kind ('sign' or 'symptom'), symptom (or the signal), step, value (of the
signal now, or the loss at the step), means."""


class Alerts:
    """Sees the records of a training, and tells of its first sign and of each kind of symptom, once in a run.

    A sign is an alarm of a signal that has been on for some time. A symptom is what a detector sees; a leap of the loss
    that is gone at once is none. Each alert is a line of alerts.jsonl in the run's directory, a call of `callback` and
    a start of `command`, in this order. What fails of it is a warning, and never ends the training.

    Give it to a recorder: `jaxrnn.Recorder(directory, state, on_row=jaxrnn.Alerts(directory, command=...))`; also to
    `jaxrnn.keras.Recorder` and to `jaxrnn.record`. They close it.

    Args:
        directory: of the run.
        command: is split as a shell would, and run without one, beside the training. {run}, {symptom}, {step} and the
            other fields of an alert are put into its words. What it prints is dropped.
        callback: gets each alert, a dictionary; the training waits for it.
        detectors: what a symptom is, gravest first.
        alarms: of signals, as of `detect.alarms_of`.
        loss: the field of a record that is the loss; found by its name if not given.
        every: steps between looks; of a record that isn't finite at once.

    Raises:
        UserError: a command that can't be read, with an unknown placeholder; something in place of alerts.jsonl.

    >>> import tempfile
    >>> def step(x, batch):
    ...     return x * batch, {'loss': x}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     alerts = jaxrnn.Alerts(directory, callback=lambda alert: print(alert['symptom'], alert['step']))
    ...     batches = lambda k: 0.5 if k != 5 else float('inf')
    ...     _ = jaxrnn.record(step, batches, lambda: 1.0, directory, max_steps=9, on_row=alerts)
    nonfinite 5
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        command: str = '',
        callback: Callable[[dict[str, Any]], Any] | None = None,
        detectors: Sequence[detect.Detector] = detect.DETECTORS,
        alarms: Sequence[detect.Detector] = detect.ALARMS,
        loss: str = '',
        every: int = 100,
    ):
        if every < 1:
            raise UserError(f'every: {every} found, at least 1 expected')
        self._paths = layout.Paths(Path(directory))
        self._command = Command.parsed(command) if command else None
        self._callback, self._detectors = callback, detectors
        self.alarms = {alarm.kind: alarm for alarm in alarms}
        self._asked, self._every = loss, every
        self._told = Told(self._paths.alerts)
        self._runner = Runner()
        self._next: int | None = None  # the step that follows what was seen
        self._loss: str | None = None
        self._failed = False

    def __call__(self, row: Row) -> None:
        """Takes the next record."""
        if self._failed:
            return
        try:
            if row[STEP] != self._next:
                self._open(row)
            self._take(row, self._watch(row), self._watch.columns)
        except Exception as error:
            self._fail(error)

    def begin(self, records: Records, found: Sequence[Symptom]) -> None:
        """For a loop with a `detect.Watch` of its own, of symptoms and of `alarms`: takes what is there already, and
        what that saw in it."""
        try:
            self._start(records[0] if records else {'loss': 0.0})
            self._begin(records, found)
        except Exception as error:
            self._fail(error)

    def see(self, row: Row, found: Sequence[Symptom], columns: Series) -> None:
        """Likewise: takes the next record, what the loop's own watch saw, and its columns."""
        if self._failed:
            return
        try:
            self._take(row, found, columns)
        except Exception as error:
            self._fail(error)

    def end(self, found: Sequence[Symptom]) -> None:
        """Likewise: takes what the loop's own watch saw when it looked last."""
        if self._next is not None and not self._failed:
            self._tell_symptoms(_settled(found))

    def close(self) -> None:
        """Looks at what wasn't looked at yet, and waits for commands, for some seconds. More records may follow."""
        if self._next is not None and not self._failed:
            try:
                self.end(self._watch.look())
            except Exception as error:
                self._fail(error)
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _open(self, row: Row) -> None:
        """What was recorded before a row: of a run that is gone on with, or goes on from where it was before."""
        records = RecordFile(self._paths.records).read_intact().between(0, row[STEP])
        self._start(records[0] if records else row)
        self._begin(records, self._watch.see_all(records))

    def _start(self, row: Row) -> None:
        """Before the first record of a run, or of a part of it."""
        numbers = [name for name, value in row.items() if not isinstance(value, str)]
        self._loss, candidates = detect.loss_of(numbers, self._asked)
        if self._loss is None and len(candidates) > 1:
            log.warning('alerts: %s', detect.asked_for(candidates))
        self._watch = detect.Watch(self._every, [*self._detectors, *self.alarms.values()], self._loss)
        self._spikes = detect.SpikeFilter(self._every)

    def _begin(self, records: Records, found: Sequence[Symptom]) -> None:
        near = records[-1000:]
        losses = near.columns.get(self._loss) if self._loss and len(near) else None
        self._spikes.begin(
            [] if losses is None else [*zip(near.steps.tolist(), losses.tolist(), strict=True)]
        )
        self._next = int(records.steps[-1]) + 1 if len(records) else 0
        self._tell_symptoms(_settled(found))

    def _take(self, row: Row, found: Sequence[Symptom], columns: Series) -> None:
        step = row[STEP]
        self._next = step + 1
        lasting = self._spikes(step, row.get(self._loss or '', float('nan')), found)
        if not found and not lasting:
            return
        alarms = [seen for seen in found if seen.kind in self.alarms]
        if alarms and not self._told.has(SIGN, ''):
            sign = detect.lasting_alarm(alarms, columns, self.alarms)
            if sign is not None:
                means = self.alarms[sign.signal].means
                self._tell(SIGN, sign.signal, sign.step, row.get(sign.signal), means)
        self._tell_symptoms(lasting)

    def _tell_symptoms(self, found: Sequence[Symptom]) -> None:
        """Each that wasn't told, and is no alarm."""
        for symptom in found:
            if symptom.kind not in self.alarms and not self._told.has(SYMPTOM, symptom.kind):
                means = next((d.means for d in self._detectors if d.kind == symptom.kind), '')
                self._tell(SYMPTOM, symptom.kind, symptom.step, self._spikes.at(symptom.step), means)

    def _tell(self, kind: str, symptom: str, step: int, value: Any, means: str) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
        run = os.path.abspath(self._paths.root)
        alert = {'time': now, 'run': run, 'kind': kind, 'symptom': symptom, 'step': step, 'value': value,
                 'means': means}  # fmt: skip
        self._told.note(alert)
        if self._callback is not None:
            try:
                self._callback(dict(alert))
            except Exception as error:
                log.warning('alerts: the callback raised %s: %s', type(error).__name__, error)
        if self._command is not None:
            self._runner.start(self._command.filled(alert))

    def _fail(self, error: Exception) -> None:
        """An error of ours ends the alerts, and not the training."""
        self._failed = True
        log.warning('alerts: no more of them, as looking failed: %s: %s', type(error).__name__, error)


def _settled(found: Sequence[Symptom]) -> list[Symptom]:
    """Without leaps of the loss, of which isn't known what became of them."""
    return [symptom for symptom in found if symptom.kind != 'spike']
