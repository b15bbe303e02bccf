"""All that is private to Keras' trainer on JAX, so that another version of it needs to be looked at here alone.

Between steps `fit` holds four lists of arrays, (trainable, non-trainable, optimiser, metrics) variables. A step is
`model.train_function(state, iterator)`, which draws a batch, calls the jitted `model.train_step` and gives the logs and
the state after it. With `steps_per_execution` it calls it as often, or until the iterator ends.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras

from jaxrnn.types import Tree, UserError

Logs = dict[str, Any]


class Lists(NamedTuple):
    """A state as Keras' train function has it, in the order of the model's own lists of variables."""

    trainable: list[Any]
    non_trainable: list[Any]
    optimizer: list[Any]
    metrics: list[Any]


TrainFunction = Callable[[Any, Iterator[Tree]], tuple[Logs, Any]]


def check_backend() -> None:
    """Raises UserError where Keras doesn't compute by JAX."""
    if (found := keras.backend.backend()) != 'jax':
        raise UserError(
            f'keras: the backend {found!r} found, jax expected; set KERAS_BACKEND=jax before keras is imported'
        )


def train_function(model: keras.Model) -> TrainFunction:
    """That of a compiled model, the one with which `fit` trains; made if it isn't there yet.

    Raises:
        UserError: the model isn't compiled, or Keras has another train function than is known here.
    """
    if not model.compiled:
        raise UserError('model: one that is not compiled found; call model.compile as in the training')
    model.make_train_function()
    return checked(model.train_function)


def checked(function: Any) -> TrainFunction:
    """A train function that can be called as is known here. Raises UserError for any other."""
    try:
        found = [*inspect.signature(function).parameters]
    except (TypeError, ValueError):
        found = []
    if found != ['state', 'iterator']:
        raise UserError(
            f'keras {keras.__version__}: a train function of ({", ".join(found)}) found, (state, iterator) expected; '
            'this version of keras is not known here: install keras 3.15'
        )
    return function


def on_one_batch(function: TrainFunction, state: Lists, data: Tree) -> tuple[Logs, Lists]:
    """One step, however many the train function makes of a longer iterator."""
    logs, after = function(tuple(state), iter((data,)))
    return logs, Lists(*after)


def build(model: keras.Model, data: Tree) -> None:
    """Makes the variables of model, optimiser and metrics that are not there yet, as `fit` does before its first step.

    Raises:
        UserError: the batch isn't one for this model, or Keras has no such function.
    """
    if not hasattr(model, '_symbolic_build'):
        raise UserError(
            f'keras {keras.__version__}: no Model._symbolic_build found, by which fit builds a model; '
            'this version of keras is not known here: install keras 3.15'
        )
    try:
        model._symbolic_build(data_batch=data)
    except (ValueError, TypeError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [''])[0]
        raise UserError(
            f"model: it can't be built for a batch of the run ({why}); give the model that trained"
        ) from None


def with_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> TrainFunction:
    """A model's own `train_step`, not compiled, with another optimiser. The model is left as it is: what steps is a
    second object of the same layers and variables."""
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin.__dict__['optimizer'] = optimizer

    def function(state: Any, iterator: Iterator[Tree]) -> tuple[Logs, Any]:
        return twin.train_step(state, next(iterator))

    return function
