"""A recorded step of Keras' as the debugger takes steps: `step(state, batch) -> (state, record)`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.adapters.keras import trainer
from jaxrnn.adapters.keras.metrics import StepMetrics
from jaxrnn.adapters.keras.variables import RATE, Variables
from jaxrnn.record.records import STEP, Records
from jaxrnn.types import Record, Step, Tree

NAMES = ('x', 'y', 'sample_weight')
"""What a batch of Keras' is made of, in its order."""

DATA, OUTSIDE = 'data', 'outside'


def kept(data: Tree, outside: Mapping[str, np.ndarray]) -> Tree:
    """A batch as it is kept.

    Args:
        data: as the train function has it.
        outside: what callbacks changed before the step: name of a variable -> value.
    """
    named = (
        dict(zip(NAMES, data, strict=False))
        if type(data) is tuple and len(data) <= len(NAMES)
        else {DATA: data}
    )
    return {**named, OUTSIDE: dict(outside)}


def data_of(batch: Mapping[str, Any]) -> Tree:
    """The batch as the train function has it."""
    return batch[DATA] if DATA in batch else tuple(batch[name] for name in NAMES if name in batch)


class Rates(NamedTuple):
    """The learning rate of each step. It is looked up by the number that the state has, and not kept with the batches:
    a step on another batch has the rate of its own place in the training."""

    values: np.ndarray  # float64 [S], NaN where none was recorded

    @classmethod
    def of(cls, records: Records) -> 'Rates':
        columns = records.columns
        if RATE not in columns or not len(columns[STEP]):
            return cls(np.zeros(0))
        steps = columns[STEP].astype(np.int64)
        values = np.full(steps.max() + 1, np.nan)
        values[steps] = columns[RATE]
        return cls(values)

    @property
    def constant(self) -> float | None:
        """The rate of the whole run, if it has one."""
        known = {*self.values[np.isfinite(self.values)].tolist()}
        return known.pop() if len(known) == 1 else None

    def at(self, step: Any, otherwise: Any) -> Any:
        """The rate of a step; `otherwise` where it isn't known, as after the run's last."""
        dtype = jnp.result_type(otherwise)
        if not self.values.size:
            return otherwise
        if isinstance(step, jax.core.Tracer) or isinstance(otherwise, jax.core.Tracer):
            found = jnp.asarray(self.values.astype(dtype))[jnp.minimum(step, self.values.size - 1)]
            return jnp.where((step < self.values.size) & jnp.isfinite(found), found, otherwise)
        if step < self.values.size and np.isfinite(self.values[int(step)]):
            return self.values[int(step)].astype(dtype)
        return otherwise


def step_of(
    function: trainer.TrainFunction, noted: Variables, metrics: StepMetrics, rates: Rates, factor: float = 1
) -> Step:
    """The step of a run.

    Args:
        function: Keras' train function.
        noted: the variables of the run.
        metrics: of the model.
        rates: of the run.
        factor: by which its rates are multiplied; of an optimiser whose rate is a variable.
    """

    def step(state: Tree, batch: Mapping[str, Any]) -> tuple[Tree, Record]:
        lists = trainer.Lists(*noted.lists(state, batch[OUTSIDE]), metrics.set_back())
        rate = None
        if noted.rate is not None:
            rate = rates.at(state[STEP], lists.optimizer[noted.rate])
            lists.optimizer[noted.rate] = rate if factor == 1 else rate * factor
        logs, after = trainer.on_one_batch(function, lists, data_of(batch))
        record = metrics.recorded(logs)
        if noted.rate is not None:
            record[RATE] = jnp.copy(after.optimizer[noted.rate])  # which the next step may consume
            if factor != 1:
                after.optimizer[noted.rate] = rate
        return noted.state(*after[:3], state[STEP] + 1), record

    return step
