"""Outcomes of experiments, kept with a run: a diagnosis that was interrupted, or is asked for again, goes on from them.

One JSON line for each, as it is known. The first line is a digest of all that decides an outcome beside the change and
the steps: a file with another one is of no use, and is begun anew.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrnn import environment, files
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment.outcome import VERDICTS
from jaxrnn.experiment.window import Window
from jaxrnn.record.records import Records, Row
from jaxrnn.types import UserError

MOST_BYTES = 64 << 20
"""Of the file; an outcome has 200 bytes."""


class CachedOutcome(NamedTuple):
    """What became of the symptom under one change, over some steps."""

    verdict: str
    symptom: Symptom | None
    loss: float
    reached: int
    acted: bool
    steps: int  # that were replayed for it
    losses: tuple[float, ...] = ()  # of its last steps


class OutcomeCache:
    """Those of a run, by the change and its steps; in a file if there is a path.

    Args:
        path: of the file; None to keep nothing.
        scope: of `scope`.

    Raises:
        UserError: where something other than a regular file is at `path`.
    """

    def __init__(self, path: Path | None, scope: str):
        self._path, self._scope = path, scope
        self._known = {} if path is None else _read(path, scope)
        self._begun = bool(self._known)

    def get(self, change: str, start: int, horizon: int) -> CachedOutcome | None:
        """change: its identity; '' of one that is nobody's but this process's."""
        return self._known.get((change, start, horizon)) if change else None

    def put(self, change: str, start: int, horizon: int, known: CachedOutcome) -> None:
        if self._path is None or not change:
            return
        line = {'change': change, 'start': start, 'horizon': horizon, **known._asdict()}
        line['symptom'] = None if known.symptom is None else [known.symptom.kind, known.symptom.step]
        line['loss'] = _finite(known.loss)
        line['losses'] = [_finite(loss) for loss in known.losses]
        # The break first: a line that was half written is ended by it.
        begin = '' if self._begun else json.dumps({'scope': self._scope})
        with files.open_appending(self._path, anew=not self._begun) as file:
            file.write(f'{begin}\n{json.dumps(files.sealed(line))}'.encode())
        self._begun = True


def scope(rows: Sequence[Row], symptom: Symptom, window: Window, detectors: Sequence[Detector]) -> str:
    """16 hex digits over what decides outcomes: the records from which the window's histories are taken, what is looked
    for, versions and machine, and the sources of this package."""
    described: Mapping[str, Any] = {
        'environment': environment.describe(),
        'sources': environment.sources(),
        'symptom': [symptom.kind, symptom.step],
        'window': window,
        'rules': [detector.rule.text for detector in detectors],
        'records': Records.of(rows).digest(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, scope: str) -> dict[tuple[str, int, int], CachedOutcome]:
    """Those of the same scope; a line that was half written, or has changed since, is as if it weren't there."""
    files.check_regular(path)
    try:
        lines = files.read_text(path, MOST_BYTES).splitlines()
    except (OSError, UserError):
        return {}
    found: dict[tuple[str, int, int], CachedOutcome] = {}
    for number, text in enumerate(lines):
        try:
            line = files.parse_json(text, str(path))
            if number == 0 and line != {'scope': scope}:
                return {}
            if number:
                line = files.unsealed(line)
                found[line['change'], line['start'], line['horizon']] = _outcome(line)
        except (ValueError, KeyError, TypeError, AttributeError, UserError):
            if number == 0:
                return {}
    return found


def _outcome(line: Mapping[str, Any]) -> CachedOutcome:
    """Raises ValueError, KeyError or TypeError for what isn't one that `put` wrote."""
    symptom = None if line['symptom'] is None else Symptom(*line['symptom'])
    losses = tuple(map(_number, line.get('losses', ())))
    loss = _number(line['loss'])
    made = CachedOutcome(
        line['verdict'], symptom, loss, line['reached'], line['acted'], line['steps'], losses
    )
    whole = [
        made.reached,
        made.steps,
        line['start'],
        line['horizon'],
        *([] if symptom is None else [symptom.step]),
    ]
    if made.verdict not in VERDICTS or any(type(each) is not int for each in whole):
        raise ValueError(line)
    if type(made.acted) is not bool or not isinstance(line['change'], str):
        raise ValueError(line)
    if symptom is not None and not isinstance(symptom.kind, str):
        raise ValueError(line)
    return made


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _number(written: float | None) -> float:
    return math.nan if written is None else float(written)
