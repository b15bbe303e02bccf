"""A model's variables as a state: a dictionary by Keras' own names, as `sequential/lstm/lstm_cell/kernel`."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import keras
import numpy as np
import optax

from jaxrnn import files
from jaxrnn.record import layout
from jaxrnn.record.records import STEP
from jaxrnn.types import Tree, UserError

NOTES = 'keras.json'
"""In a run's directory: which variables it is of."""

FORMAT = 1
"""Of keras.json."""

SECTIONS = ('trainable', 'non_trainable', 'optimizer')

COUNT, RATE = 'iteration', 'learning_rate'
"""What Keras calls an optimiser's count of steps, and its rate."""

MEANS: tuple[tuple[str, Any, Mapping[str, str]], ...] = (
    ('Adam', optax.ScaleByAdamState, {'mu': '_momentum', 'nu': '_velocity'}),
    ('SGD', optax.TraceState, {'trace': '_momentum'}),
    ('RMSprop', optax.ScaleByRmsState, {'nu': '_velocity'}),
)
"""An optimiser of Keras, as what its means of gradients are kept, and how Keras' names of them end. By optax's names
the signals of a state tell them from weights."""


class Variable(NamedTuple):
    """One of a model."""

    name: str  # Keras' path; with #2 and so on where an earlier one has the same
    shape: tuple[int, ...]
    dtype: str


class Variables(NamedTuple):
    """Those that a train step changes, beside its metrics'."""

    trainable: tuple[Variable, ...]
    non_trainable: tuple[Variable, ...]
    optimizer: tuple[Variable, ...]
    kind: str = ''  # of MEANS; '' where the optimiser keeps none that are known
    key: str = ''  # by which the state has the optimiser's means

    @classmethod
    def of(cls, model: keras.Model) -> Self:
        """Those of a model that is built."""
        named: dict[str, int] = {}
        found = cls(
            tuple(_named(variable, named) for variable in model.trainable_variables),
            tuple(_named(variable, named) for variable in model.non_trainable_variables),
            tuple(_named(variable, named) for variable in model.optimizer.variables),
        )
        kinds = [kind for kind, _, _ in MEANS if isinstance(model.optimizer, getattr(keras.optimizers, kind))]
        if not kinds or not _means(found._replace(kind=kinds[0])):
            return found
        return found._replace(kind=kinds[0], key=f'{model.optimizer.name}/means')

    @property
    def counter(self) -> int | None:
        """Which of the optimiser's variables counts its steps; None where it isn't clear."""
        return self._only(COUNT)

    @property
    def rate(self) -> int | None:
        """Which is its learning rate; None where a schedule makes it, or that isn't clear."""
        return self._only(RATE)

    def lists(self, state: Tree, outside: Mapping[str, Any] | None = None) -> tuple[list, list, list]:
        """A state as Keras has it.

        Args:
            state: as `state` gives it.
            outside: name -> value, instead of what the state has.
        """
        flat = dict(state)
        means = _means(self)
        if means:
            kept = flat.pop(self.key)
            for field, numbers in means.items():
                value = getattr(kept, field)
                leaves = [value] if field == 'count' else [value[each.name] for each in self.trainable]
                flat.update({self.optimizer[n].name: leaf for n, leaf in zip(numbers, leaves, strict=True)})
        flat.update(outside or {})
        trainable, non_trainable, optimizer = (
            [flat[v.name] for v in getattr(self, each)] for each in SECTIONS
        )
        return trainable, non_trainable, optimizer

    def state(
        self, trainable: Sequence[Any], non_trainable: Sequence[Any], optimizer: Sequence[Any], step: Any
    ) -> Tree:
        """Name -> array; the optimiser's means of gradients by the names of the weights that they belong to.

        Args:
            trainable, non_trainable, optimizer: values, in the order of Keras' own lists.
            step: that starts from it; the optimiser may count otherwise.
        """
        sections = zip(SECTIONS, (trainable, non_trainable, optimizer), strict=True)
        flat = {
            variable.name: value
            for section, values in sections
            for variable, value in zip(getattr(self, section), values, strict=True)
        }
        if means := _means(self):
            fields: dict[str, Any] = {}
            for field, numbers in means.items():
                leaves = [flat.pop(self.optimizer[n].name) for n in numbers]
                names = [each.name for each in self.trainable]
                fields[field] = leaves[0] if field == 'count' else dict(zip(names, leaves, strict=True))
            made = next(made for kind, made, _ in MEANS if kind == self.kind)
            flat[self.key] = made(**fields)
        return {**flat, STEP: step}

    def like(self) -> Tree:
        """A state of shapes and types alone."""
        trainable, non_trainable, optimizer = (
            [jax.ShapeDtypeStruct(v.shape, np.dtype(v.dtype)) for v in getattr(self, section)]
            for section in SECTIONS
        )
        return self.state(trainable, non_trainable, optimizer, jax.ShapeDtypeStruct((), np.int32))

    def check(self, model: 'Variables') -> None:
        """Raises UserError where a model's variables are others than these, by what they hold. Names may differ: Keras
        counts the layers that a process has made."""
        for section in SECTIONS:
            ours, theirs = getattr(self, section), getattr(model, section)
            for a, b in zip(ours, theirs, strict=False):
                if (a.shape, a.dtype) != (b.shape, b.dtype):
                    raise UserError(
                        f'model: {b.name} {[*b.shape]} {b.dtype} found, {a.name} {[*a.shape]} {a.dtype} expected, as '
                        'in the run; give the model that trained, or choose another directory'
                    )
            if len(ours) != len(theirs):
                raise UserError(
                    f'model: {len(theirs)} {section} variables found, {len(ours)} expected, as in the run; give the '
                    'model that trained, or choose another directory'
                )

    def to_json(self) -> dict[str, Any]:
        return {'format': FORMAT, 'keras': keras.__version__, **self._asdict()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises TypeError, ValueError or KeyError for what isn't as `to_json` made it."""
        trainable, non_trainable, optimizer = (
            tuple(_variable(each) for each in value[section]) for section in SECTIONS
        )
        kind, key = value['kind'], value['key']
        if kind not in ('', *(known for known, _, _ in MEANS)) or type(key) is not str:
            raise ValueError(f'an optimiser of kind {kind!r}')
        return cls(trainable, non_trainable, optimizer, kind, key)

    def _only(self, name: str) -> int | None:
        found = [n for n, each in enumerate(self.optimizer) if each.name.rpartition('/')[2] == name]
        return found[0] if len(found) == 1 else None


@functools.lru_cache(maxsize=16)
def _means(variables: Variables) -> dict[str, list[int]]:
    """Field of what the means are kept as -> which of the optimiser's variables it is made of; empty where they don't
    fit to the weights."""
    if not variables.kind:
        return {}
    made, endings = next((made, endings) for kind, made, endings in MEANS if kind == variables.kind)
    found = {
        field: [n for n, each in enumerate(variables.optimizer) if each.name.endswith(end)]
        for field, end in endings.items()
    }
    shapes = [each.shape for each in variables.trainable]
    if any([variables.optimizer[n].shape for n in numbers] != shapes for numbers in found.values()):
        return {}
    if 'count' not in made._fields:
        return found
    return {} if variables.counter is None else {'count': [variables.counter], **found}


def _named(variable: Any, named: dict[str, int]) -> Variable:
    named[variable.path] = count = named.get(variable.path, 0) + 1
    name = variable.path if count == 1 else f'{variable.path}#{count}'
    return Variable(name, tuple(variable.shape), str(variable.dtype))


def _variable(value: Any) -> Variable:
    name, shape, dtype = value
    if type(name) is not str or not all(type(size) is int and size >= 0 for size in shape):
        raise TypeError('a variable is no name and shape')
    return Variable(name, tuple(shape), str(np.dtype(dtype)))


def write(directory: Path, variables: Variables) -> None:
    """Notes in a run's directory which variables it is of."""
    layout.write_json(directory / NOTES, files.sealed(variables.to_json()))


def read(directory: Path) -> Variables | None:
    """Which variables a run is of; None where no recorder of Keras made it. Raises UserError for what can't be read."""
    path = directory / NOTES
    found = files.read_notes(path, FORMAT)
    if found is None:
        return None
    try:
        return Variables.from_json(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise files.not_as_written(path, error) from None
