"""What is tried against a symptom by itself: changes of the optimiser, in Keras' words."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import keras
import numpy as np

from jaxrnn.adapters.keras import steps, trainer
from jaxrnn.adapters.keras.metrics import StepMetrics
from jaxrnn.adapters.keras.variables import RATE, Variable, Variables
from jaxrnn.experiment import Change, Changed
from jaxrnn.experiment.mechanisms import KNOWN
from jaxrnn.record.records import STEP
from jaxrnn.types import BatchAt, Tree, UserError

VELOCITY, LARGEST = '_velocity', '_velocity_hat'
"""How Keras' names of Adam's v end, and of its largest value so far."""

CLIPPING = ('clipnorm', 'clipvalue', 'global_clipnorm')
"""Of which an optimiser has one at most."""


class _Try(NamedTuple):
    """A change of an optimiser's arguments."""

    name: str
    arguments: Mapping[str, Any]
    means: str
    removes: str = ''  # a mechanism, of `mechanisms.KNOWN`


TRIED = (
    _Try('clipped gradients', {'clipnorm': 1.0}, "no tensor's gradient has a norm above 1", 'outlying gradients'),
    _Try(
        'faster second moment', {'beta_2': 0.99},
        "Adam's squared gradients follow a burst within 100 steps, not 1,000", 'outrun second moment',
    ),
    _Try(
        'AMSGrad', {'amsgrad': True},
        'the second moment never decays, so quiet steps do not make the next ones long', 'second-moment decay',
    ),
    _Try(
        'larger epsilon', {'epsilon': 1e-4}, 'coordinates with tiny gradients take no full steps',
        'second-moment decay',
    ),
)  # fmt: skip

SLOWER = ((3, 'a third of the learning rate'), (10, 'a tenth of the learning rate'))


class _ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule's rates times a factor."""

    def __init__(self, schedule: Any, factor: float):
        self._schedule, self._factor = schedule, factor

    def __call__(self, step: Any) -> Any:
        return self._schedule(step) * self._factor

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError('made for an experiment, not to be saved')


def of(model: keras.Model, noted: Variables, batch_at: BatchAt, rates: steps.Rates) -> list[Change]:
    """Those that change something of a model's optimiser, in the order in which they are tried.

    Args:
        model: which is built.
        noted: the variables of the run.
        batch_at: the batches of the run.
        rates: its learning rates.
    """
    config = model.optimizer.get_config()
    if 'inner_optimizer' in config:  # LossScaleOptimizer, whose arguments are another's
        return []
    door = _Door(model, noted, batch_at, rates)
    found = [door.change(each) for each in TRIED if _applies(each.arguments, config)]
    return [*found, *(door.slower(by, name) for by, name in SLOWER)]


def _applies(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    ((name, value),) = arguments.items()
    if name not in config:
        return False
    if name in CLIPPING:
        return all(config.get(each) is None for each in CLIPPING)
    now = config[name]
    match name:
        case 'beta_2':
            return now > value
        case 'epsilon':
            return now < value
        case _:
            return now != value


class _Door:
    """Makes the changes of one run."""

    def __init__(self, model: keras.Model, noted: Variables, batch_at: BatchAt, rates: steps.Rates):
        self._model, self._noted, self._batch_at, self._rates = model, noted, batch_at, rates
        self._metrics = StepMetrics(model)

    def change(self, tried: _Try, times: int = 1) -> Change:
        """One of TRIED, with steps so many times as long."""
        removes = next((each for each in KNOWN if each.name == tried.removes), None)
        name = tried.name if times == 1 else f'{tried.name}, {times} x the rate'
        return Change(
            name, 'optimiser', lambda: self._made(tried.arguments, times),
            self._typed(tried.arguments) if times == 1 else '', tried.means, removes,
            identity=self._identity(tried.arguments, times),
            stressed=(lambda times: self.change(tried, times)) if times == 1 else None,
        )  # fmt: skip

    def slower(self, by: int, name: str, times: int = 1) -> Change:
        """A lower rate; also where callbacks or a schedule set it."""
        return Change(
            name if times == 1 else f'{name}, {times} x', 'optimiser', lambda: self._made({}, times / by),
            self._slower_as_typed(by) if times == 1 else '', 'steps are shorter',
            identity=self._identity({}, times / by), shortens=by / times,
            stressed=(lambda times: self.slower(by, name, times) if times < by else None) if times == 1 else None,
        )  # fmt: skip

    def _made(self, arguments: Mapping[str, Any], factor: float) -> Changed:
        model, noted = self._model, self._noted
        config = {**model.optimizer.get_config(), **arguments}
        if noted.rate is None and factor != 1:
            config[RATE], factor = _ScaledSchedule(_schedule(config[RATE]), factor), 1
        optimizer = type(model.optimizer).from_config(config)
        optimizer.build(model.trainable_variables)
        now = _with_new(noted, optimizer)
        function = trainer.with_optimizer(model, optimizer)
        step = steps.step_of(function, now, self._metrics, self._rates, factor)

        def convert(state: Tree) -> Tree:
            trainable, non_trainable, optimizer = noted.lists(state)
            more = _largest(noted, now, optimizer)
            return now.state(trainable, non_trainable, [*optimizer, *more], state[STEP])

        return Changed(step, self._batch_at, convert)

    def _identity(self, arguments: Mapping[str, Any], factor: float) -> str:
        return json.dumps(
            ['keras', self._model.optimizer.get_config(), arguments, factor], sort_keys=True, default=str
        )

    def _slower_as_typed(self, by: int) -> str:
        """Nothing where callbacks or a schedule set the rate: that is to be changed where they do."""
        rate = self._rates.constant
        return '' if rate is None else self._typed({RATE: rate / by})

    def _typed(self, arguments: Mapping[str, Any]) -> str:
        return as_typed(self._model.optimizer, arguments, self._rates.constant)


def as_typed(
    optimizer: keras.optimizers.Optimizer, arguments: Mapping[str, Any], rate: float | None = None
) -> str:
    """An optimiser with other arguments, as a person writes it.

    Args:
        optimizer: of the model.
        arguments: that are others.
        rate: at which it trained; None where it had several.

    >>> as_typed(keras.optimizers.Adam(0.01), {'clipnorm': 1.0}, 0.01)
    'keras.optimizers.Adam(learning_rate=0.01, clipnorm=1.0)'
    """
    config, made = optimizer.get_config(), type(optimizer)
    if not isinstance(config.get(RATE), dict):
        config[RATE] = rate
    usual = made().get_config()
    own = {
        name: value
        for name, value in config.items()
        if name != 'name' and value is not None and not _alike(value, usual.get(name))
    }
    listed = ', '.join(f'{name}={_typed(value)}' for name, value in {**own, **arguments}.items())
    module = 'keras.optimizers.' if made.__module__.startswith('keras.') else ''
    return f'{module}{made.__name__}({listed})'


def _alike(a: Any, b: Any) -> bool:
    """Keras keeps a rate in float32."""
    return a == b or (isinstance(a, float) and isinstance(b, float) and np.float32(a) == np.float32(b))


def _typed(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get('class_name', '…')).rpartition('>')[2] + '(…)'
    return (
        f'{value:.6g}' if isinstance(value, float) and not float(f'{value:.6g}').is_integer() else repr(value)
    )


def _schedule(value: Any) -> Any:
    return keras.optimizers.schedules.deserialize(value) if isinstance(value, dict) else value


def _with_new(noted: Variables, optimizer: keras.optimizers.Optimizer) -> Variables:
    """A run's variables with those that an optimiser has beside them. Raises UserError where it lacks some."""
    found = [Variable(v.path, tuple(v.shape), str(v.dtype)) for v in optimizer.variables]
    known = len(noted.optimizer)
    if [each[1:] for each in found[:known]] != [each[1:] for each in noted.optimizer]:
        raise UserError('the changed optimiser keeps other variables than that of the run')
    return noted._replace(optimizer=(*noted.optimizer, *found[known:]))


def _largest(noted: Variables, now: Variables, values: list[Any]) -> list[Any]:
    """Of AMSGrad's largest v so far: v itself, as all before it is not known."""
    kept = [
        value for each, value in zip(noted.optimizer, values, strict=True) if each.name.endswith(VELOCITY)
    ]
    new = now.optimizer[len(noted.optimizer) :]
    if not new:
        return []
    if len(new) != len(kept) or not all(each.name.endswith(LARGEST) for each in new):
        raise UserError(f'the changed optimiser has {new[0].name}, of which the run has nothing')
    return [jnp.array(value) for value in kept]
