"""The keras3 preset against Keras 3 itself: outputs, the losses of 50 Adam steps, initial weights."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tolerance import assert_close

from jaxrnn.rnn import cells
from jaxrnn.words import config, models, optimisers, train
from jaxrnn.words.data import Batch

T, B, V, E, H = 12, 16, 28, 20, 48
STEPS = 50

each_network = pytest.mark.parametrize('name', models.WIDTHS)
as_keras_likes = jax.numpy_rank_promotion
"""Keras relies on rank promotion, which the other tests forbid."""


@pytest.fixture(scope='module')
def keras(tmp_path_factory):
    """Keras on JAX; it keeps its settings off the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('KERAS_HOME', str(tmp_path_factory.mktemp('keras')))
        import keras
    assert keras.backend.backend() == 'jax'
    return keras


def keras_network(keras, name: str):
    """The network of the question, in the words of Keras."""
    layers = keras.layers
    match name:
        case 'lstm':
            stack = [layers.LSTM(H)]
        case 'gru':
            stack = [layers.GRU(H)]
        case 'stacked':
            stack = [
                layers.LSTM(H, return_sequences=True),
                layers.TimeDistributed(layers.Dense(H, activation='sigmoid')),
                layers.LSTM(H),
                layers.Dense(H // 2, activation='tanh'),
            ]
    return keras.Sequential([keras.Input((T, V)), *stack, layers.Dense(E)])


class Network(NamedTuple):
    params: dict
    predict: Callable  # params, letters [T, B] -> [B, E]


@functools.cache
def our_network(name: str) -> Network:
    options = config.Model(network=name, preset='keras3', hidden=H)
    graph, state = nnx.split(
        models.build(options, letters=V, vector_size=E, key=jax.random.key(0)), nnx.Param
    )

    def predict(params, letters):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(letters)

    return Network(nnx.to_pure_dict(state), predict)


def keras_weights(params: dict) -> list[np.ndarray]:
    """Our parameters in the order of Keras' `set_weights`; its GRU keeps both biases in one array."""
    made = []
    for layer in ('recurrent', 'lower', 'between', 'upper', 'narrow', 'output'):
        leaves = params.get(layer, {})
        names = [name for name in ('kernel', 'recurrent_kernel', 'bias') if name in leaves]
        made += [np.asarray(leaves[name]) for name in names]
        if 'recurrent_bias' in leaves:
            made[-1] = np.stack([made[-1], leaves['recurrent_bias']])
    return made


def shaken(params: dict) -> dict:
    """With noise on all, so that no bias is 0 and no two gates start alike."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(leaf + rng.normal(size=leaf.shape) * 0.1), params)


def words(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (T, B), np.int32)


def one_hot(letters: np.ndarray) -> np.ndarray:
    """As Keras takes them, [B, T, V]."""
    return np.eye(V, dtype=np.float32)[letters.T]


@each_network
def test_outputs(keras, name):
    network = our_network(name)
    params, letters = shaken(network.params), words(0)
    with as_keras_likes('allow'):
        theirs = keras_network(keras, name)
        theirs.set_weights(keras_weights(params))
        expected = np.asarray(theirs(one_hot(letters)))
    assert np.std(expected) > 0.1
    assert_close(jax.jit(network.predict)(params, letters), expected, 'keras forward')


def batches() -> list[Batch]:
    """Ten batches, to be taken in turn; targets of length 1."""
    rng = np.random.default_rng(1)
    made = []
    for seed in range(10):
        targets = rng.normal(size=(B, E))
        targets /= np.linalg.norm(targets, axis=1, keepdims=True)
        made.append(Batch(words(seed), targets.astype(np.float32), np.arange(B, dtype=np.int32)))
    return made


@each_network
def test_losses_of_training(keras, name):
    network = our_network(name)
    with as_keras_likes('allow'):
        theirs = keras_network(keras, name)
        theirs.compile(optimizer=keras.optimizers.Adam(), loss='mse')
        theirs.set_weights(keras_weights(network.params))
        expected = []
        for step in range(STEPS):
            batch = batches()[step % 10]
            theirs.reset_metrics()  # or the loss told is a mean over all steps
            expected.append(theirs.train_on_batch(one_hot(batch.letters), batch.targets))
        trained = [np.asarray(variable.value) for variable in theirs.weights]

    preset = cells.PRESETS['keras3']
    optimiser = optimisers.build(config.Optimiser(), epsilon=preset.epsilon, epsilon_hat=preset.epsilon_hat)
    step_once = jax.jit(train.make_step(network.predict, optimiser, lambda state: jnp.float32(1e-3)))
    state = train.TrainState(jnp.int32(0), network.params, optimiser.init(network.params))
    losses = []
    for step in range(STEPS):
        state, record = step_once(state, batches()[step % 10])
        losses.append(record['loss'])

    assert losses[40] < 0.95 * losses[0]  # it does learn; both are of the same batch
    assert_close(losses, expected, 'keras losses')
    for weights, leaf in zip(keras_weights(state.params), trained, strict=True):
        assert_close(weights, leaf, 'keras weights')


@pytest.mark.parametrize(
    ('clip', 'theirs'),
    [('none', {}), ('per_leaf', {'clipnorm': 0.7}), ('global_norm', {'global_clipnorm': 0.7})],
)
def test_clipped_adam(keras, clip, theirs):
    rng = np.random.default_rng(0)

    def drawn(scale):
        return [np.float32(scale * rng.normal(size=shape)) for shape in ((5, 4), (4,))]

    params = drawn(1)
    preset = cells.PRESETS['keras3']
    ours = optimisers.build(
        config.Optimiser(clip=clip, clip_threshold=0.7),
        epsilon=preset.epsilon,
        epsilon_hat=preset.epsilon_hat,
    )
    state = ours.init(params)
    variables = [keras.Variable(leaf) for leaf in params]
    adam = keras.optimizers.Adam(**theirs)
    for scale in (1e-6, 0.1, 3, 0.1, 1e-6):
        gradients = drawn(scale)
        updates, state = ours.update(gradients, state, params, value=0.0)
        params = optax.apply_updates(params, updates)
        with as_keras_likes('allow'):
            adam.apply(gradients, variables)
    for leaf, variable in zip(params, variables, strict=True):
        assert_close(leaf, variable.value, 'keras weights')


@each_network
def test_initial_weights(keras, name):
    """Keras' own draw has the limits, the orthogonality and the biases of ours."""
    keras.utils.set_random_seed(0)
    with as_keras_likes('allow'):
        theirs = keras_network(keras, name).weights
    ours = keras_weights(our_network(name).params)
    for variable, weights in zip(theirs, ours, strict=True):
        pair = [np.asarray(variable.value, np.float64), np.asarray(weights, np.float64)]
        assert pair[0].shape == pair[1].shape
        match variable.name:
            case 'recurrent_kernel':
                for recurrent_kernel in pair:
                    assert_close(recurrent_kernel @ recurrent_kernel.T, np.eye(H), 'float32 orthogonal')
            case 'kernel':
                limit = np.sqrt(6 / sum(weights.shape))
                for kernel in pair:
                    assert 0.98 * limit < np.max(np.abs(kernel)) <= limit
            case 'bias':
                assert_close(*pair, 'exact')
