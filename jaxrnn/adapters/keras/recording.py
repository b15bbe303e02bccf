"""The callback that records `model.fit`, step by step."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxrnn.adapters.keras import steps, trainer, variables
from jaxrnn.adapters.keras.metrics import StepMetrics
from jaxrnn.adapters.keras.trainer import Lists, Logs, TrainFunction
from jaxrnn.record import layout
from jaxrnn.record.recorder import Recorder, read_notes
from jaxrnn.types import Tree, UserError

log = logging.getLogger('jaxrnn')


class KerasRecorder(keras.callbacks.Callback):
    """Records a training by `model.fit`, so that it can be bisected, traced and diagnosed.

    What trains is Keras' own jitted train function, on the batches that `fit` draws, untouched. The model is as it was
    when `fit` returns or raises. A run that is there already is gone on with: its newest intact state is loaded into
    the model when training begins, and steps are counted on. Epochs are counted by `fit`: give it `initial_epoch`.

    A record has `loss` and the other metrics of the step alone, not Keras' running means: the step is given metrics
    that are set back, and what it gives is added to the epoch's sum (see `metrics`). So a loss is what `train_step`
    computed, but for the rounding of Keras' own mean, loss * examples / examples. Beside them are `epoch`, and of an
    epoch's last step `val_loss` and whatever else validation gave, if it is known which step is the last: of a
    generator without a length that is from the second epoch on. Metrics of your own classes are not recorded.

    Callbacks may change the model between two steps: what they set the learning rate to is in the records, as
    `learning_rate`, and whatever else they change is kept with the batch.

    Args:
        directory: of the run, made if it isn't there.
        options: as of `jaxrnn.Recorder`: checkpoint_every, keep_latest, keep_every, digest_every, most_bytes, on_row.

    Raises:
        UserError: another backend than JAX; when training begins, a run of another model, or a directory that can't be
            used.
    """

    def __init__(self, directory: str | os.PathLike, **options: Any):
        super().__init__()
        trainer.check_backend()
        self.directory = Path(directory)
        self._options = options
        self._trained: keras.Model | None = None  # Callback.model moves all variables at each look
        self._epoch = self._taken = 0
        self._length: int | None = None  # of an epoch, in steps, if that is known
        self._recording: _Recording | None = None

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._trained = model

    def on_train_begin(self, logs: Any = None) -> None:
        close_left_open(self.directory)
        self._length = (self.params or {}).get('steps')
        assert self._trained is not None
        before, self._recording = self._recording, None
        self._recording = _Recording(self._trained, self.directory, self._options, before)
        _open[_key(self.directory)] = self._recording

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        self._taken = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._recording is not None:
            self._recording.tap(_Place(self._epoch, batch, self._length))
            self._taken = batch + 1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Nothing; that it is here has Keras call the callbacks one after the other."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._length = self._taken
        if self._recording is not None:
            self._recording.put(
                {name: value for name, value in (logs or {}).items() if name.startswith('val_')}
            )

    def on_train_end(self, logs: Any = None) -> None:
        if self._recording is not None:
            self._recording.close()


_Values = tuple[list[Any], list[Any], list[Any]]


class _Place(NamedTuple):
    """Where in a training a step is."""

    epoch: int
    batch: int  # counted from the epoch's first
    length: int | None  # of the epoch

    @property
    def is_last(self) -> bool:
        return self.batch + 1 == self.length


class _Recording:
    """One call of `fit`, recorded.

    Args:
        model: which is built.
        directory: of the run.
        options: of the recorder.
        before: the call before by the same callback, if there was one.
    """

    def __init__(
        self, model: keras.Model, directory: Path, options: dict[str, Any], before: '_Recording | None'
    ):
        self._model = model
        found = variables.Variables.of(model)
        begun = read_notes(layout.Paths(directory)) is not None
        self._variables = _named(found, directory) if begun else found
        self._metrics = StepMetrics(model)
        state = self._variables.state(*_values(model), np.zeros((), np.int32))
        self._recorder = Recorder(directory, state, **options)
        self._pending: tuple[Tree, Logs, Tree] | None = None
        self._is_open = True
        if not begun:
            variables.write(directory, self._variables)
        self._left, self._copies = self._begun(before, begun)

    def tap(self, place: _Place) -> None:
        """Has the next call of the train function recorded, and that one only: `fit` doesn't tell its callbacks when it
        raises, so that nothing may be left in the model."""
        model, function = self._model, trainer.checked(self._model.train_function)
        history = model.history  # of this call of fit

        def tapped(state: Any, iterator: Iterator[Tree]) -> tuple[Logs, Any]:
            model.train_function = function
            if model.history is not history:  # another call: a callback raised between the two
                return function(state, iterator)
            return self._steps(function, Lists(*state), iterator, place)

        model.train_function = tapped

    def put(self, more: Logs) -> None:
        """The record of an epoch's last step, which waits for the metrics that validation gives after it."""
        if self._pending is not None:
            (state, logs, batch), self._pending = self._pending, None
            self._recorder(state, {**logs, **more}, batch)

    def close(self) -> None:
        """Writes what is still to be written. Says what it can't, where something else ended the training."""
        if self._is_open:
            self._is_open = False
            _open.pop(_key(self._recorder.paths.root), None)
            with self._recorder:
                self.put({})

    @property
    def step(self) -> int:
        """The number of the next."""
        return self._recorder.step

    def _begun(self, before: '_Recording | None', begun: bool) -> tuple[_Values, _Values]:
        """What the step before left, and a copy of what of it may be consumed. Of a run that is there already it is
        loaded into the model; unless it is this model that left it so."""
        state = self._recorder.state
        if before is not None and before._model is self._model and before.step == self.step:
            return before._left, before._copies
        if begun:
            for section, loaded in zip(_sections(self._model), self._variables.lists(state), strict=True):
                for variable, value in zip(section, loaded, strict=True):
                    variable.assign(value)
            log.warning('%s: the training goes on from step %d', self._recorder.paths.root, self.step)
        values = _values(self._model)
        return values, values

    def _steps(
        self, function: TrainFunction, state: Lists, iterator: Iterator[Tree], place: _Place
    ) -> tuple[Logs, Any]:
        """As many as Keras makes in a call, each by itself."""
        try:
            self.put({})
            logs, state = self._step(function, state, next(iterator), place)
            for more in range(1, self._model.steps_per_execution):
                try:
                    data = next(iterator)
                except StopIteration:
                    break
                self.put({})
                logs, state = self._step(function, state, data, place._replace(batch=place.batch + more))
        except StopIteration:  # the data is at its end, of which nothing was taken
            raise
        except BaseException as error:
            self._fail(error)
            raise
        return logs, tuple(state)

    def _step(self, function: TrainFunction, state: Lists, data: Tree, place: _Place) -> tuple[Logs, Lists]:
        batch = steps.kept(data, self._changed_outside(state))
        own = state._replace(metrics=self._metrics.of_step(state.metrics))
        logs, after = trainer.on_one_batch(function, own, data)
        running, shown = self._metrics.added(state.metrics, after.metrics, logs)
        self._left = self._copies = after[:3]
        noted = {**self._metrics.recorded(logs), 'epoch': place.epoch}
        if (rate := self._variables.rate) is not None:
            noted[variables.RATE] = jnp.copy(after.optimizer[rate])  # which the next step consumes
        if place.is_last:  # validation consumes what it is given
            self._copies = jax.tree.map(jnp.copy, self._left)
        following = np.array(self.step + 1, np.int32)
        self._pending = self._variables.state(*self._copies, following), noted, batch
        if not place.is_last:
            self.put({})
        return shown, after._replace(metrics=running)

    def _changed_outside(self, state: Lists) -> dict[str, np.ndarray]:
        """What is another than the step before left: callbacks did it. Read before the step consumes it. A rate is in
        the records instead."""
        rate = self._variables.rate
        rates = () if rate is None else (self._variables.optimizer[rate],)
        return {
            variable.name: np.array(now)
            for section, left, kept, found in zip(
                variables.SECTIONS, self._left, self._copies, state[:3], strict=True
            )
            for variable, was, copy, now in zip(
                getattr(self._variables, section), left, kept, found, strict=True
            )
            if was is not now and variable not in rates and not _same_bits(copy, now)
        }

    def _fail(self, error: BaseException) -> None:
        """Closes before an error leaves `fit`, which is what is to be said."""
        try:
            self.close()
        except UserError as failure:
            if failure is not error:
                log.warning('%s', failure)


_open: dict[str, _Recording] = {}
"""By directory. `fit` doesn't tell its callbacks that it raised."""


def close_left_open(directory: Path) -> None:
    """Ends a recording whose `fit` was ended by an error in something else than a step."""
    if (left := _open.get(_key(directory))) is not None:
        left.close()


def _key(directory: Path) -> str:
    return os.path.realpath(directory)


def _named(found: variables.Variables, directory: Path) -> variables.Variables:
    """A model's variables by the names that the run has. Raises UserError where it is of another model."""
    noted = variables.read(directory)
    if noted is None:
        raise UserError(f'{directory} holds a run that no recorder of Keras made; choose another directory')
    noted.check(found)
    return noted


def _sections(model: keras.Model) -> tuple[list, list, list]:
    return model.trainable_variables, model.non_trainable_variables, model.optimizer.variables


def _values(model: keras.Model) -> tuple[list, list, list]:
    trainable, non_trainable, optimizer = ([variable.value for variable in each] for each in _sections(model))
    return trainable, non_trainable, optimizer


def _same_bits(a: Any, b: Any) -> bool:
    if a.is_deleted():  # by a step that somebody took between two calls of fit
        return False
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
