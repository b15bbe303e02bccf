"""Which field of a record is the loss: people log it under many names."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxrnn.record.telemetry import OURS
from jaxrnn.types import UserError

FIRST_CHOICE = (
    'loss',
    'total_loss',
    'loss_total',
    'train_loss',
    'training_loss',
    'loss_train',
    'metrics_loss',
)
"""The whole loss of a training step, by its usual names; the first that is there."""

OTHERS = (
    'nll',
    'cost',
    'objective',
    'cross_entropy',
    'xent',
    'mse',
    'neg_elbo',
    'energy',
    'train_nll',
    'train_mse',
)

_LOSS = re.compile(r'(^|_)loss(_|$)')
_NOT_TRAINING = re.compile(r'(^|_)(val|valid|validation|eval|test|dev|best|ema|avg|scale|weight)(_|$)')


class Loss(NamedTuple):
    """What a run's loss is called."""

    field: str | None  # None where it isn't known
    candidates: Sequence[str] = ()  # where several may be it


def loss_of(fields: Iterable[str], given: str = '') -> Loss:
    """The field that is the loss: the one that is given, the one whose name says so, or the only number there is.

    Raises:
        UserError: the given one isn't there.

    >>> loss_of(['step', 'train_loss', 'accuracy']).field
    'train_loss'
    >>> loss_of(['actor_loss', 'critic_loss'])
    Loss(field=None, candidates=('actor_loss', 'critic_loss'))
    """
    names = [name for name in fields if name not in OURS and not name.startswith('finite_')]
    if given:
        if given not in names:
            raise UserError(f'loss: no field {given!r} in the records; there are {", ".join(sorted(names))}')
        return Loss(given)
    by_lower = {name.lower(): name for name in names}
    for name in (*FIRST_CHOICE, *OTHERS):
        if name in by_lower:
            return Loss(by_lower[name])
    named = [n for n in names if _LOSS.search(n.lower()) and not _NOT_TRAINING.search(n.lower())]
    whole = [n for n in named if re.search(r'(^|_)(total|train|training)(_|$)', n.lower())]
    for found in (whole, named, names):
        if len(found) == 1:
            return Loss(found[0])
    return Loss(None, tuple(named))


def asked_for(candidates: Sequence[str]) -> UserError:
    """Which of several is the loss has to be said."""
    listed = ', '.join(candidates)
    return UserError(f'loss: {listed} found, and each may be it; say which, as loss={candidates[0]!r}')
