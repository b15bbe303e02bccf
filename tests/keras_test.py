"""The door to Keras: what model.fit trained is replayed bit for bit, and diagnosed in Keras' words."""

import importlib
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn.cli import common, own_runs
from jaxrnn.record.kept_batches import KeptBatches
from jaxrnn.record.record_file import RecordFile
from jaxrnn.types import UserError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
"""Keras itself, where it reads a rate."""

T, V, E, B = 4, 5, 3, 8
N = 6 * B  # examples: an epoch has 6 steps


@pytest.fixture(scope='module', autouse=True)
def _ranks():
    """Keras relies on rank promotion, which the other tests forbid; in threads, too."""
    before = jax.config.values['jax_numpy_rank_promotion']
    jax.config.update('jax_numpy_rank_promotion', 'allow')
    yield
    jax.config.update('jax_numpy_rank_promotion', before)


@pytest.fixture(scope='module')
def keras(tmp_path_factory):
    """Keras on JAX; it keeps its settings off the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('KERAS_HOME', str(tmp_path_factory.mktemp('keras')))
        import keras
    keras.utils.set_random_seed(0)
    return keras


@pytest.fixture
def record(tmp_path):
    """A callback, and what reads the run that it leaves."""

    class Run:
        directory = tmp_path / 'run'

        def __call__(self, **options):
            return jaxrnn.keras.Recorder(
                self.directory, **{'checkpoint_every': 4, 'digest_every': 1, **options}
            )

        @property
        def rows(self):
            return [*RecordFile(self.directory / 'records.jsonl').read()]

        def assert_replayed(self, model, steps):
            found, _ = jaxrnn.keras.bisect(model, self.directory, verify=True)
            assert len(self.rows) == steps == found.replay.steps_replayed
            assert found.replay.bit_identical and found.replay.first_mismatch is None
            return found

    return Run()


def recurrent(keras, optimizer='adam', activation='tanh', **options):
    """A network with all that has a state of its own: a seed of dropout, means of batch normalisation."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((T, V)),
            layers.LSTM(4, activation=activation),
            layers.Dropout(0.2),
            layers.BatchNormalization(),
            layers.Dense(E),
        ]
    )
    model.compile(loss='mse', optimizer=optimizer, metrics=['accuracy'], **options)
    return model


def dense(keras, optimizer='adam', **options):
    model = keras.Sequential([keras.Input((V,)), keras.layers.Dense(4, 'tanh'), keras.layers.Dense(E)])
    model.compile(loss='mse', optimizer=optimizer, metrics=['accuracy'], **options)
    return model


def examples(*shape, count=N, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    return x, np.tanh(x.reshape(count, -1)[:, :E])


def weights(model):
    return [np.asarray(variable.value) for variable in (*model.variables, *model.optimizer.variables)]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def halving(keras):
    return keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.01 * 0.5**epoch)


def test_epochs_are_replayed_bit_for_bit(keras, record):
    """Shuffled, with dropout, batch normalisation, validation and a rate that a callback sets; with another object."""
    model, rng = recurrent(keras), np.random.default_rng(1)
    x, y = examples(T, V)
    history = model.fit(
        x, y, batch_size=B, epochs=3, verbose=0, validation_data=(rng.normal(size=(B, T, V)), y[:B]),
        callbacks=[halving(keras), record()],
    ).history  # fmt: skip
    record.assert_replayed(recurrent(keras), 18)
    rows = record.rows
    assert [row['epoch'] for row in rows] == [0] * 6 + [1] * 6 + [2] * 6
    assert [row['learning_rate'] for row in rows[::6]] == pytest.approx([0.01, 0.005, 0.0025])
    assert len({row['loss'] for row in rows}) == 18
    validated = [row for row in rows if 'val_loss' in row]
    assert [row['step'] for row in validated] == [5, 11, 17]
    for name in ('val_loss', 'val_accuracy'):
        assert [row[name] for row in validated] == pytest.approx(history[name])
    for name in ('loss', 'accuracy'):  # Keras' are means over an epoch
        means = np.mean([[row[name] for row in rows[n : n + 6]] for n in (0, 6, 12)], axis=1)
        np.testing.assert_allclose(means, history[name], rtol=1e-6)


def test_the_state_is_called_as_keras_calls_it(keras, record):
    model = recurrent(keras)
    model.fit(*examples(T, V), batch_size=B, verbose=0, callbacks=[record()])
    from jaxrnn.adapters.keras import replaying

    run = replaying.opened(model, record.directory)
    like = run.variables.like()
    paths = {variable.path for variable in (*model.trainable_variables, *model.non_trainable_variables)}
    assert paths < like.keys()
    (kernel,) = (path for path in paths if path.endswith('/lstm_cell/kernel'))
    assert like[kernel].shape == (V, 16)
    (means,) = (value for name, value in like.items() if name.endswith('/means'))
    assert means.mu.keys() == {variable.path for variable in model.trainable_variables}


def test_training_is_what_it_is_without(keras, record):
    """Weights, the optimiser's state and what fit shows."""
    x, y = examples(T, V)
    found = []
    for callbacks in ([], [record()]):
        keras.utils.set_random_seed(3)
        model = recurrent(keras)
        history = model.fit(x, y, batch_size=B, epochs=2, verbose=0, callbacks=callbacks).history
        found.append((weights(model), history, {*vars(model)}))
    assert same(found[0][0], found[1][0]) and found[0][2] == found[1][2]
    for name, values in found[0][1].items():
        np.testing.assert_allclose(found[1][1][name], values, rtol=3e-7)


def test_a_loss_is_that_of_its_step(keras, record):
    """Against Keras' own for one batch at a time, of the batches that were kept."""
    keras.utils.set_random_seed(4)
    model, alone = dense(keras), dense(keras)
    alone.set_weights(model.get_weights())
    x, y = examples(V)
    model.fit(x * 1e3, y, batch_size=B, epochs=2, verbose=0, callbacks=[record()])
    kept = KeptBatches(record.directory / 'batches')
    for row in record.rows:
        batch = kept(row['step'])
        expected = alone.train_on_batch(batch['x'], batch['y'], return_dict=True)
        for metric in ('loss', 'accuracy'):
            assert np.float32(row[metric]) == np.float32(expected[metric])


class Changing:
    """Makes the callback that sets weights in the midst of an epoch."""

    def __new__(cls, keras):
        class Callback(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 2:
                    kernel = self.model.trainable_variables[0]
                    kernel.assign(kernel.value * 0.5)

            def on_epoch_end(self, epoch, logs=None):
                self.model.evaluate(*examples(V, seed=9), verbose=0)  # consumes what the step left

        return Callback()


def sequence(keras, x, y):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(x) // B

        def __getitem__(self, number):
            return x[number * B : (number + 1) * B], y[number * B : (number + 1) * B]

    return Batches()


def generator(keras, x, y):
    for number in range(1000):
        at = number % (len(x) // B) * B
        yield x[at : at + B], y[at : at + B], np.linspace(0.5, 2, B, dtype=np.float32)


FITS = {
    'sample weights': lambda keras, x, y: {'x': x, 'y': y, 'sample_weight': np.linspace(0, 1, N, dtype=np.float32)},
    'a last batch that is smaller': lambda keras, x, y: {'x': x[:-3], 'y': y[:-3]},
    'PyDataset': lambda keras, x, y: {'x': sequence(keras, x, y)},
    'a generator': lambda keras, x, y: {'x': generator(keras, x, y), 'steps_per_epoch': 6, 'shuffle': False},
    'later epochs': lambda keras, x, y: {'x': x, 'y': y, 'initial_epoch': 3, 'epochs': 5},
    'callbacks that change weights': lambda keras, x, y: {'x': x, 'y': y, 'callbacks': [Changing(keras)]},
    'validation_split': lambda keras, x, y: {'x': x, 'y': y, 'validation_split': 0.2},
}  # fmt: skip


@pytest.mark.parametrize('name', FITS)
def test_whatever_fit_is_given(keras, record, name):
    model, given = dense(keras), FITS[name](keras, *examples(V))
    batches = {'batch_size': B} if 'y' in given else {}
    callbacks = [*given.pop('callbacks', ()), record()]
    options = {'epochs': 2, 'verbose': 0, **batches, **given}
    model.fit(**options, callbacks=callbacks)
    before = weights(model)
    record.assert_replayed(dense(keras), 10 if name == 'validation_split' else 12)
    assert same(before, weights(model))
    if name == 'later epochs':
        assert [row['epoch'] for row in record.rows[::6]] == [3, 4]


MODELS = {
    'steps_per_execution': lambda keras: dense(keras, steps_per_execution=4),
    'run_eagerly': lambda keras: dense(keras, run_eagerly=True),
    'momentum': lambda keras: dense(keras, keras.optimizers.SGD(0.1, momentum=0.9)),
    'RMSprop': lambda keras: dense(keras, 'rmsprop'),
    'a schedule': lambda keras: dense(
        keras, keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 5, 0.5))
    ),
    'an average of weights': lambda keras: dense(keras, keras.optimizers.Adam(use_ema=True, clipnorm=1.0)),
    'accumulated gradients': lambda keras: dense(keras, keras.optimizers.Adam(gradient_accumulation_steps=2)),
}


@pytest.mark.parametrize('name', MODELS)
def test_whatever_is_compiled(keras, record, name):
    """By two calls of fit with one callback, the second of which goes on where the first ended."""
    found = []
    for recorded in (False, True):
        keras.utils.set_random_seed(5)
        model = MODELS[name](keras)
        callbacks = [record()] if recorded else []
        twice = name != 'an average of weights'  # after which Keras itself can't go on
        for _ in range(1 + twice):
            model.fit(*examples(V), batch_size=B, epochs=2 - twice, verbose=0, callbacks=callbacks)
        found.append(weights(model))
    assert same(*found)
    record.assert_replayed(MODELS[name](keras), 12)


def test_a_train_step_of_your_own(keras, record):
    class Model(keras.Sequential):
        def train_step(self, state, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            logs, state = super().train_step(state, (x, y * 2))
            return {**logs, 'doubled': logs['loss'] * 2}, state

    def make():
        model = Model([keras.Input((V,)), keras.layers.Dense(E)])
        model.compile(loss='mse', optimizer='adam')
        return model

    make().fit(*examples(V), batch_size=B, verbose=0, callbacks=[record()])
    record.assert_replayed(make(), 6)
    assert all(row['doubled'] == np.float32(2) * np.float32(row['loss']) for row in record.rows)


def test_classes_have_weights(keras, record):
    model = keras.Sequential([keras.Input((V,)), keras.layers.Dense(2, 'softmax')])
    model.compile(loss='sparse_categorical_crossentropy', optimizer='adam')
    x, _ = examples(V)
    model.fit(
        x, (x[:, 0] > 0).astype(int), batch_size=B, verbose=0, class_weight={0: 1.0, 1: 3.0}, callbacks=[record()]
    )  # fmt: skip
    record.assert_replayed(model, 6)
    assert {'x', 'y', 'sample_weight'} < KeptBatches(record.directory / 'batches')(0).keys()


def test_a_metric_of_your_own_is_shown_and_not_recorded(keras, record):
    class Last(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name='last')
            self.value = self.add_variable((), 'zeros')

        def update_state(self, y, predictions, sample_weight=None):
            self.value.assign(self.value * 2 + 1)

        def result(self):
            return self.value.value

    model = dense(keras)
    model.compile(loss='mse', optimizer='adam', metrics=['accuracy', Last(), keras.metrics.R2Score()])
    history = model.fit(*examples(V), batch_size=B, epochs=2, verbose=0, callbacks=[record()]).history
    assert history['last'] == [2**6 - 1] * 2
    assert 'last' not in record.rows[0] and {'loss', 'accuracy', 'r2_score'} <= record.rows[0].keys()
    record.assert_replayed(model, 12)


# Faults


def test_a_corrupt_batch_is_found(keras, record):
    """One letter of one example, in a batch drawn at random, is so large that a cell without its tanh overflows."""
    place = int.from_bytes(os.urandom(4)) % 10 + 1
    x, y = examples(T, V, count=2 * N)
    model = recurrent(keras, activation='linear')
    kernel, *others = model.get_weights()
    model.set_weights([kernel * 10, *others])
    x[place * B + 5, 2] = 3e38
    model.fit(x, y, batch_size=B, shuffle=False, verbose=0, callbacks=[record()])
    found, rows = jaxrnn.keras.bisect(recurrent(keras, activation='linear'), record.directory)
    assert (found.symptom.kind, found.first_bad_step) == ('nonfinite', place)
    assert found.replay.bit_identical and len(rows) == place % 4 + 1
    where = found.where
    assert (where['pass'], where['examples'], where['time_step']) == ('forward', [5], 2)
    assert re.fullmatch(r'lstm(_\d+)?/lstm_cell', where['layer']), where


@pytest.mark.parametrize('network', ['lstm', 'gru', 'stacked'])
def test_the_question(keras, record, network, monkeypatch):
    """Its networks, as the example has them: a letter of one word is lost, and with it a batch."""
    monkeypatch.syspath_prepend(ROOT / 'examples')
    question = importlib.import_module('question')

    def make():
        return question.make(network, hidden=6, shape=(T, V), size=E)

    letters = np.random.default_rng(0).integers(0, V, (N, T))
    x, y = np.eye(V, dtype=np.float32)[letters], examples(T, V)[1]
    x[4 * B + 6, 1] = np.inf
    make().fit(x, y, batch_size=B, shuffle=False, verbose=0, callbacks=[record()])
    found, _ = jaxrnn.keras.bisect(make(), record.directory, verify=True)
    assert found.replay.bit_identical and found.replay.steps_replayed >= len(record.rows) == 6
    assert (found.first_bad_step, found.where['source'], found.where['examples']) == (4, 'batch/x', [6])
    from jaxrnn.adapters.keras import variables

    assert question.NETWORKS == {'lstm': 1024, 'gru': 1024, 'stacked': 512}
    names = {each.name.split('/', 1)[1] for each in variables.read(record.directory).trainable}
    cells = {re.sub(r'_\d+/', '/', name).partition('/')[2] for name in names}
    assert f'{"gru" if network == "gru" else "lstm"}_cell/recurrent_kernel' in cells


def test_a_collapse_of_the_question_is_averted_by_a_change(keras, record, monkeypatch):
    """Its LSTM learns real words; then its rate is a hundred times as high."""
    monkeypatch.syspath_prepend(ROOT / 'examples')
    question = importlib.import_module('question')
    keras.utils.set_random_seed(0)
    x, y = question.words(count=64, steps=12)
    model = question.make('lstm', hidden=16, shape=x.shape[1:], size=y.shape[1])
    jump = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.005 if epoch < 40 else 0.5)
    model.fit(x, y, batch_size=16, epochs=60, verbose=0, callbacks=[jump, record(checkpoint_every=50)])
    found, report = jaxrnn.keras.diagnose(model, record.directory)
    assert found.replay.bit_identical and report.identical
    assert found.symptom.kind in ('spike', 'collapse', 'diverged')
    assert 160 <= found.onset_step <= found.first_bad_step <= 180
    assert re.search(r'lstm(_\d+)?/lstm_cell/|dense(_\d+)?/', found.where['layer'])
    assert found.cause.kind == 'optimiser', found.cause
    averting = next(each for each in found.remedies if each['outcome'] == 'averted')
    assert averting['name'] == 'a tenth of the learning rate', found.remedies


def test_a_nan_is_found_in_its_place(keras, record):
    x, y = examples(V, count=2 * N)
    y[7 * B + 2, 1] = np.nan
    model = dense(keras)
    model.fit(x, y, batch_size=B, shuffle=False, verbose=0, callbacks=[record()])
    found, _ = jaxrnn.keras.bisect(model, record.directory)
    assert (found.symptom.kind, found.first_bad_step) == ('nonfinite', 7)
    assert (found.where['source'], found.where['examples']) == ('batch/y', [2])
    assert 'nonfinite at step 7' in str(found)


def test_a_divergence_is_averted_by_a_change(keras, record):
    """The rate is 300 times as high from step 30 on."""
    keras.utils.set_random_seed(0)
    model = dense(keras, keras.optimizers.SGD(0.02))
    jump = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.02 if epoch < 3 else 6.0)
    model.fit(
        *examples(V, count=10 * B), batch_size=B, epochs=8, verbose=0, callbacks=[jump, record(checkpoint_every=10)]
    )  # fmt: skip
    found, report = jaxrnn.keras.diagnose(model, record.directory, budget=800)
    assert found.replay.bit_identical and found.symptom.kind == 'nonfinite' and report.identical
    assert found.where['layer'] == 'compile_loss/mse' and '/keras/' in found.where['source']
    verdicts = {outcome.change.name: outcome.verdict for outcome in report.outcomes}
    assert verdicts['a tenth of the learning rate'] == 'averted', verdicts
    assert (found.cause.kind, found.remedies[0]['outcome']) == ('optimiser', 'averted')


# Changes


def tried(keras, model, record):
    from jaxrnn.adapters.keras import changes, replaying

    run = replaying.opened(model, record.directory)
    return run, {change.name: change for change in changes.of(model, run.variables, run.batch_at, run.rates)}


ADAM = {
    'clipped gradients': {'clipnorm': 1.0},
    'faster second moment': {'beta_2': 0.99},
    'AMSGrad': {'amsgrad': True},
    'larger epsilon': {'epsilon': 1e-4},
    'a third of the learning rate': {'learning_rate': 0.1 / 3},
    'a tenth of the learning rate': {'learning_rate': 0.01},
}


@pytest.mark.parametrize('name', ADAM)
def test_a_change_is_what_its_flags_make(keras, record, name):
    """From the first step on it trains as a model that was compiled so."""
    start = dense(keras, keras.optimizers.Adam(0.1))
    first = start.get_weights()
    x, y = examples(V)
    fit = {'batch_size': B, 'shuffle': False, 'verbose': 0, 'epochs': 2}
    start.fit(x * 10, y, **fit, callbacks=[record()])
    before = weights(start)
    run, changes = tried(keras, start, record)
    assert changes.keys() == ADAM.keys()
    change = changes[name]
    made = change.make()
    state = made.convert(run.variables.state(*_initial(record, run), np.int32(0)))
    losses = []
    step = jax.jit(made.step)
    for number in range(12):
        state, logs = step(state, made.batch_at(number))
        losses.append(float(logs['loss']))
    other = eval(change.flags, {'keras': keras})
    assert {n: other.get_config()[n] for n in ADAM[name]} == pytest.approx(ADAM[name])
    expected = dense(keras, other)
    expected.set_weights(first)
    wanted = jaxrnn.keras.Recorder(record.directory.with_name('expected'))
    expected.fit(x * 10, y, **fit, callbacks=[wanted])
    rows = RecordFile(wanted.directory / 'records.jsonl').read()
    np.testing.assert_allclose(losses, [row['loss'] for row in rows], rtol=1e-4)
    assert same(before, weights(start)) and start.optimizer.get_config()['learning_rate'] == np.float32(0.1)


def _initial(record, run):
    from jaxrnn.record.checkpoint import Checkpoints

    state = Checkpoints(record.directory / 'checkpoints', like=run.variables.like()).restore(0)
    return run.variables.lists(state)


def test_only_changes_that_apply_are_tried(keras, record):
    rates = {'a third of the learning rate', 'a tenth of the learning rate'}
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    wanted = {
        'sgd': (keras.optimizers.SGD(0.1), {'clipped gradients'}),
        'clipped': (keras.optimizers.Adam(clipvalue=1.0, beta_2=0.9, amsgrad=True, epsilon=0.1), set()),
        'schedule': (keras.optimizers.RMSprop(schedule, clipnorm=1.0), {'larger epsilon'}),
    }
    for name, (optimizer, names) in wanted.items():
        model = dense(keras, optimizer)
        run = type(record)()
        run.directory = record.directory / name
        model.fit(*examples(V), batch_size=B, verbose=0, callbacks=[run()])
        found = tried(keras, model, run)[1]
        assert found.keys() == names | rates
        flags = {change.name: change.flags for change in found.values()}
    assert flags['larger epsilon'] == (
        'keras.optimizers.RMSprop(learning_rate=ExponentialDecay(…), clipnorm=1.0, epsilon=0.0001)'
    )
    assert flags['a tenth of the learning rate'] == ''  # it is the schedule that is to be changed


def test_a_batch_brings_no_rate_along(keras, record):
    """A step on the batch of another epoch has the rate of its own."""
    model = dense(keras)
    model.fit(*examples(V), batch_size=B, epochs=2, verbose=0, callbacks=[halving(keras), record()])
    run, _ = tried(keras, model, record)
    assert run.rates.constant is None
    state = run.variables.state(*_initial(record, run), np.int32(0))
    for step in (run.step, jax.jit(run.step)):
        _, logs = step(jax.tree.map(np.array, state), run.batch_at(8))
        assert float(logs['learning_rate']) == np.float32(0.01)
    later = {**state, 'step': np.int32(8)}
    assert float(jax.jit(run.step)(later, run.batch_at(1))[1]['learning_rate']) == np.float32(0.005)


# Going on


KILLED = """
import os, sys
import keras, numpy as np, jaxrnn
sys.path.insert(0, sys.argv[1])
import keras_test
model = keras_test.recurrent(keras)

class Dying(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if self.params['epochs'] == 3 and int(sys.argv[3]) and batch == 4 and self.epoch == 1:
            os._exit(7)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

recorder = jaxrnn.keras.Recorder(sys.argv[2], checkpoint_every=4, digest_every=1)
x, y = keras_test.examples(keras_test.T, keras_test.V)
model.fit(x, y, batch_size=keras_test.B, epochs=3, verbose=0, callbacks=[recorder, Dying()])
"""


def test_a_killed_training_goes_on(keras, record, caplog):
    """In another process it was killed within an epoch; a model of this one goes on."""
    command = [sys.executable, '-c', KILLED, str(ROOT / 'tests'), str(record.directory), '1']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_NUMPY_RANK_PROMOTION': 'allow'}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    model = recurrent(keras)
    at_start = []

    class Start(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if not at_start:
                at_start.extend(np.asarray(v.value) for v in self.model.trainable_variables)

    with caplog.at_level(logging.INFO, 'jaxrnn'):
        model.fit(
            *examples(T, V), batch_size=B, epochs=3, initial_epoch=1, verbose=0, callbacks=[record(), Start()]
        )
    (said,) = [each.message for each in caplog.records if 'goes on' in each.message]
    step = int(said.rpartition('goes on from step ')[2])
    assert step in (4, 8)  # of the last, the process was killed while it was written
    record.assert_replayed(recurrent(keras), step + 12)
    state = jaxrnn.state(*_step(model, record), step, like=_like(model, record))
    assert int(state['step']) == step
    assert same(at_start, [np.asarray(state[name]) for name in _names(record)])


def _opened(model, record):
    from jaxrnn.adapters.keras import replaying

    return replaying.opened(model, record.directory)


def _step(model, record):
    return _opened(model, record).step, None, record.directory


def _like(model, record):
    return _opened(model, record).variables.like()


def _names(record):
    from jaxrnn.adapters.keras import variables

    return [each.name for each in variables.read(record.directory).trainable]


def test_weights_changed_between_two_fits_are_kept(keras, record):
    model, recorder = dense(keras), record()
    model.fit(*examples(V), batch_size=B, verbose=0, callbacks=[recorder])
    model.set_weights([weight + 1 for weight in model.get_weights()])
    model.train_on_batch(*examples(V, count=B))
    model.fit(*examples(V), batch_size=B, verbose=0, callbacks=[recorder])
    record.assert_replayed(model, 12)
    assert len(KeptBatches(record.directory / 'batches')(6)['outside']) >= 4


def raised_by(keras, where):
    class Raising(keras.callbacks.Callback):
        pass

    def fail(self, *_, **__):
        raise KeyboardInterrupt

    setattr(Raising, where, fail)
    return Raising()


@pytest.mark.parametrize(
    ('where', 'steps'), [('on_train_batch_begin', 0), ('on_train_batch_end', 1), ('on_epoch_end', 6)]
)
def test_the_model_is_as_it_was_when_fit_raises(keras, record, where, steps):
    """And the steps before are there."""
    model = dense(keras)
    model.fit(*examples(V), batch_size=B, verbose=0)
    function, names = model.train_function, {*vars(model)}
    fit = {'batch_size': B, 'verbose': 0}
    with pytest.raises(KeyboardInterrupt):
        model.fit(*examples(V), **fit, callbacks=[record(), raised_by(keras, where)])
    if where == 'on_train_batch_begin':  # between the callback and the step
        model.fit(*examples(V), **fit)
        assert record.rows == []
    assert model.train_function is function
    assert {*vars(model)} <= names | {'_jax_state'}
    model.fit(*examples(V), **fit, callbacks=[record()])
    record.assert_replayed(model, steps + 6)


def test_data_that_raises_leaves_the_steps_before(keras, record):
    def broken():
        x, y = examples(V)
        yield x[:B], y[:B]
        yield x[:B], y[:B]
        raise RuntimeError('no more')

    model = dense(keras)
    function = None
    with pytest.raises(RuntimeError, match='no more'):
        model.fit(broken(), steps_per_epoch=5, shuffle=False, verbose=0, callbacks=[record()])
    function = model.train_function
    model.make_train_function()
    assert model.train_function is function and 'tapped' not in repr(function)
    record.assert_replayed(model, 2)


# Errors


def test_another_model_is_refused(keras, record, tmp_path):
    model = dense(keras)
    model.fit(*examples(V), batch_size=B, verbose=0, callbacks=[record()])
    other = keras.Sequential([keras.Input((V,)), keras.layers.Dense(5, 'tanh'), keras.layers.Dense(E)])
    other.compile(loss='mse', optimizer='adam')
    more = keras.Sequential(
        [keras.Input((V,)), keras.layers.Dense(4), keras.layers.Dense(E), keras.layers.Dense(E)]
    )
    more.compile(loss='mse', optimizer='adam')
    for one, said in (
        (other, r'kernel \[5, 5\] float32 found, .*kernel \[5, 4\] float32 expected'),
        (more, '6 trainable variables found, 4 expected'),
        (dense(keras, 'sgd'), 'optimizer variables found'),
    ):
        with pytest.raises(UserError, match=said):
            jaxrnn.keras.bisect(one, record.directory)
        with pytest.raises(UserError, match=said):
            one.fit(*examples(V), batch_size=B, verbose=0, callbacks=[record()])
    uncompiled = keras.Sequential([keras.Input((V,)), keras.layers.Dense(E)])
    with pytest.raises(UserError, match=r'call model\.compile'):
        jaxrnn.keras.bisect(uncompiled, record.directory)
    with pytest.raises(UserError, match=r'no keras.json found'):
        jaxrnn.keras.diagnose(model, tmp_path)
    (record.directory / 'keras.json').write_text('{"format": 1}')
    with pytest.raises(UserError, match='not as a recorder wrote it'):
        jaxrnn.keras.bisect(model, record.directory)


def test_a_run_of_another_recorder_is_refused(keras, record):
    with jaxrnn.Recorder(record.directory, jnp.zeros(1)) as recorder:
        recorder(jnp.ones(1), {'loss': 1.0}, 1.0)
    with pytest.raises(UserError, match='no recorder of Keras made'):
        dense(keras).fit(*examples(V), batch_size=B, verbose=0, callbacks=[record()])


def test_a_version_that_is_not_known_is_named(keras, record, monkeypatch):
    model = dense(keras)
    model.fit(*examples(V), batch_size=B, verbose=0)
    model.train_function = lambda state, data: None
    with pytest.raises(UserError, match=rf'keras {keras.__version__}: .*\(state, data\) found'):
        model.fit(*examples(V), batch_size=B, verbose=0, callbacks=[record()])
    monkeypatch.setattr(keras.backend, 'backend', lambda: 'tensorflow')
    with pytest.raises(UserError, match='KERAS_BACKEND=jax'):
        record()


# The command line


MODULE = """
import keras

def make():
    model = keras.Sequential([keras.layers.Dense(4, 'tanh'), keras.layers.Dense(3)])
    model.compile(loss='mse', optimizer='adam', metrics=['accuracy'])
    return model
"""


def jaxrnn_(*arguments, directory):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_NUMPY_RANK_PROMOTION': 'allow'}
    del env['KERAS_BACKEND']
    command = [sys.executable, '-m', 'jaxrnn', *arguments]
    return subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, timeout=120)


def test_the_command_line(keras, record, tmp_path):
    """With a model that isn't built: it has no Input."""
    x, y = examples(V, count=2 * N)
    x[8 * B] = np.nan
    dense(keras).fit(x, y, batch_size=B, shuffle=False, verbose=0, callbacks=[record()])
    (tmp_path / 'mine.py').write_text(textwrap.dedent(MODULE))
    done = jaxrnn_('bisect', '--run_dir=run', '--model=mine:make', directory=tmp_path)
    assert done.returncode == common.DIVERGED and 'nonfinite at step 8' in done.stdout, done.stderr
    assert '--model=mine:make' in done.stdout.splitlines()[-1]


def test_what_is_typed_wrongly(keras, record, tmp_path, monkeypatch):
    dense(keras).fit(*examples(V), batch_size=B, verbose=0, callbacks=[record()])

    def asked(model, directory=record.directory):
        monkeypatch.setattr(common, 'typed', lambda name: model if name == 'model' else '')
        if own_runs.is_one('diagnose', str(directory)):
            return own_runs._program()

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'type .*diagnose --run_dir=.*--model=my_module:make'):
        asked('')
    with pytest.raises(UserError, match='leave --model out'):
        asked('mine:make', tmp_path)
    with pytest.raises(UserError, match='a module and a function expected'):
        asked('mine')
    with pytest.raises(UserError, match='no module nothing_there found'):
        asked('nothing_there:make')
    with pytest.raises(UserError, match='no function nothing found in json'):
        asked('json:nothing')


def test_the_page_says_what_is_so(keras, tmp_path, monkeypatch, capsys):
    """Its blocks of Python are run as they are."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / 'docs' / 'keras.md').read_text(encoding='utf-8')
    x, y = examples(V)
    scope = {'model': dense(keras), 'x': x, 'y': y}
    for block in re.findall(r'```py\n(.*?)```', page, re.DOTALL):
        exec(block, scope)
    assert 'healthy' in capsys.readouterr().out
