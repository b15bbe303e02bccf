"""haiku: a network with state and random keys; the training state is a named tuple that has the key, too."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn


class TrainingState(NamedTuple):
    params: hk.Params
    state: hk.State
    opt_state: optax.OptState
    rng: jax.Array


def forward(images, is_training):
    x = hk.Linear(10)(images)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    x = jax.nn.relu(x)
    if is_training:
        x = hk.dropout(hk.next_rng_key(), 0.1, x)
    return hk.Linear(2)(x)


network = hk.transform_with_state(forward)
optimiser = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(5e-2, momentum=0.9))


@jax.jit
def update(train_state, batch):
    rng, next_rng = jax.random.split(train_state.rng)

    def loss_fn(params):
        logits, state = network.apply(params, train_state.state, rng, batch['image'], is_training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean(), state

    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
    updates, opt_state = optimiser.update(grads, train_state.opt_state, train_state.params)
    params = optax.apply_updates(train_state.params, updates)
    return TrainingState(params, state, opt_state, next_rng), loss


def batches(size=8):
    rng = np.random.default_rng()
    while True:
        image = rng.normal(size=(size, 4)).astype(np.float32)
        yield {'image': image, 'label': (image.sum(axis=1) > 0).astype(np.int32)}


def initial_state():
    rng, init_rng = jax.random.split(jax.random.PRNGKey(42))
    params, state = network.init(init_rng, jnp.zeros((1, 4)), is_training=True)
    return TrainingState(params, state, optimiser.init(params), rng)


def main(loader, directory):
    train_state = initial_state()
    history = []
    with jaxrnn.Recorder(directory, train_state, checkpoint_every=10) as recorder:  # recorder
        train_state = recorder.state  # recorder
        for batch in loader:
            train_state, loss = update(train_state, batch)
            history.append(float(loss))
            recorder(train_state, loss, batch)  # recorder
    return history


def replayed():
    return update, initial_state()
