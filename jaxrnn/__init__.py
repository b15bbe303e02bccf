"""jaxrnn: LSTM and GRU training in JAX that says at which step it broke, and proves it by replay.

    jaxrnn.record(step, batch_at, init, 'runs/mine', max_steps=1000)
    diagnosis, rows = jaxrnn.bisect(step, batch_at, 'runs/mine', like=init)
    diagnosis, report = jaxrnn.diagnose(step, batch_at, 'runs/mine', changes, like=init)
    jaxrnn.report('runs/mine', diagnosis, report)

Rooms, each of which imports only those below it:

    cli         the command `jaxrnn`
    words       the question's networks         adapters    doors for nnx, Keras
    alerts      somebody is told
    report      what a person reads             exports     files for other programs
    experiment  which change averts a symptom
    bisect      the first bad step, proven
    detect      records -> symptoms
    optim       what optax lacks                record      a run: loop, records, checkpoints
    rnn         the fast recurrence             trace       a function evaluated equation by equation
    escaping, errors, types, environment,       ground
    tree, diagnosis, package, progress
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrnn import trace as trace
    from jaxrnn.adapters import keras as keras
    from jaxrnn.alerts import Alerts as Alerts
    from jaxrnn.bisect import bisect as bisect
    from jaxrnn.bisect import state as state
    from jaxrnn.experiment import Change as Change
    from jaxrnn.experiment import Changed as Changed
    from jaxrnn.experiment import diagnose as diagnose
    from jaxrnn.exports import export as export
    from jaxrnn.record import Drawn as Drawn
    from jaxrnn.record import Recorder as Recorder
    from jaxrnn.record import record as record
    from jaxrnn.report import report as report
    from jaxrnn.types import UserError as UserError

__version__ = '0.1.0'
__all__ = [
    'Alerts',
    'Change',
    'Changed',
    'Drawn',
    'Recorder',
    'UserError',
    'bisect',
    'diagnose',
    'export',
    'record',
    'report',
    'state',
    'trace',
]

_ROOMS = ('bisect', 'record', 'report', 'trace')
"""Of these names the package itself is meant; the first three can be called."""

_HOMES = {
    'Alerts': 'jaxrnn.alerts',
    'Change': 'jaxrnn.experiment',
    'Changed': 'jaxrnn.experiment',
    'diagnose': 'jaxrnn.experiment',
    'export': 'jaxrnn.exports',
    'state': 'jaxrnn.bisect',
    'Drawn': 'jaxrnn.record',
    'Recorder': 'jaxrnn.record',
    'UserError': 'jaxrnn.types',
}


def __getattr__(name: str) -> Any:
    """All of __all__, imported when they are wanted: JAX takes its time."""
    if name in ('bisect', 'diagnose'):
        importlib.import_module('jaxrnn.report')  # so that a diagnosis can be printed
    if name == 'keras':
        return importlib.import_module('jaxrnn.adapters.keras')
    if name in _ROOMS:
        return importlib.import_module(f'jaxrnn.{name}')
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
