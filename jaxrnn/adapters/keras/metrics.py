"""Metrics of one step, of a train function whose metrics run on over an epoch.

Keras' metrics add up what they see until `fit` sets them back. Of a sum over thousands of steps the last step can't be
told: after one loss of 1e6 the next thousand would be rounded away. So a step is given metrics that are set back, gives
those of its batch alone, and they are added to the sum afterwards, as Keras would have done in the step. Weights don't
depend on metrics, so that no bit of the training is another.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxrnn.adapters.keras.trainer import Logs


class StepMetrics:
    """The metrics of a model that is built.

    Those whose sums are Keras' own doing can be set back for a step, and added up. One that somebody wrote may do
    anything with its variables: it is left as it is, and isn't in the record.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        each = [*_single(model.metrics)]
        ours = {id(variable) for metric in each if _adds_up(metric) for variable in metric.variables}
        self._shapes = [(tuple(v.shape), np.dtype(v.dtype)) for v in model.metrics_variables]
        self._adds_up = [id(variable) in ours for variable in model.metrics_variables]
        self._left_out = tuple(metric.name for metric in each if not _adds_up(metric))
        compiled = model.jit_compile and not model.run_eagerly
        self._sums = jax.jit(self._summed) if compiled else self._summed

    def set_back(self) -> list[np.ndarray]:
        """The variables' values at an epoch's start."""
        return [np.zeros(*shape) for shape in self._shapes]

    def of_step(self, running: Sequence[Any]) -> list[Any]:
        """What a step is given instead of the epoch's values."""
        return [
            zero if adds else value
            for zero, adds, value in zip(self.set_back(), self._adds_up, running, strict=True)
        ]

    def added(self, running: Sequence[Any], own: Sequence[Any], logs: Logs) -> tuple[list[Any], Logs]:
        """The epoch's values after a step, and the logs that Keras shows of them.

        Args:
            running: the values before it.
            own: what the step gave for `of_step(running)`.
            logs: which it gave, too.
        """
        values, results = self._sums(list(running), list(own))
        return values, {name: results.get(name, value) for name, value in logs.items()}

    def recorded(self, logs: Logs) -> Logs:
        """The scalars of a step's own logs."""
        return {
            name: value for name, value in logs.items() if np.size(value) == 1 and not self._is_left_out(name)
        }

    def _summed(self, running: list[Any], own: list[Any]) -> tuple[list[Any], Logs]:
        values = [
            jnp.add(before, new).astype(new.dtype) if adds else new
            for before, new, adds in zip(running, own, self._adds_up, strict=True)
        ]
        with keras.StatelessScope(state_mapping=[*zip(self._model.metrics_variables, values, strict=True)]):
            return values, self._model.get_metrics_result()

    def _is_left_out(self, name: str) -> bool:
        """With several outputs Keras writes the output's name in front."""
        return any(name == each or name.endswith(f'_{each}') for each in self._left_out)


def _single(metrics: Sequence[Any]) -> Iterator[Any]:
    """Metrics without those that are made of others, as that of `compile(metrics=...)`."""
    for metric in metrics:
        within = getattr(metric, 'metrics', None)
        if isinstance(within, list | tuple):
            yield from _single(within)
        else:
            yield metric


def _adds_up(metric: Any) -> bool:
    """Whether it is one of Keras' own, which all keep sums: totals, counts, confusion matrices."""
    return type(metric).update_state.__module__.partition('.')[0] == 'keras'
