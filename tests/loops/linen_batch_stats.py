"""linen: a TrainState with batch statistics and a key, of which each step folds its own dropout key."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

import jaxrnn


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        x = nn.Dense(12, name='embed')(x)
        x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
        x = nn.Dropout(0.2, deterministic=not training)(nn.relu(x))
        return nn.Dense(3, name='logits')(x)


class TrainState(train_state.TrainState):
    batch_stats: Any
    key: jax.Array


@jax.jit
def train_step(state, batch):
    dropout_key = jax.random.fold_in(state.key, state.step)

    def loss_fn(params):
        logits, updates = state.apply_fn(
            {'params': params, 'batch_stats': state.batch_stats},
            batch['image'],
            training=True,
            rngs={'dropout': dropout_key},
            mutable=['batch_stats'],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()
        return loss, (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=updates['batch_stats'])
    return state, {'loss': loss, 'accuracy': jnp.mean(jnp.argmax(logits, -1) == batch['label'])}


def batches(size=8):
    images = np.random.default_rng(2).normal(size=(48, 7)).astype(np.float32)
    labels = np.argmax(images[:, 2:5], axis=1)
    while True:
        order = np.random.default_rng().permutation(48)
        for start in range(0, 48, size):
            chosen = order[start : start + size]
            yield {'image': images[chosen], 'label': labels[chosen]}


def create_train_state(key):
    params_key, dropout_key = jax.random.split(key)
    model = Network()
    variables = model.init(params_key, jnp.ones((1, 7)), training=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        key=dropout_key,
        tx=optax.adam(1e-2),
    )


def main(loader, directory):
    state = create_train_state(jax.random.key(0))
    history = []
    with jaxrnn.Recorder(directory, state, checkpoint_every=10) as recorder:  # recorder
        state = recorder.state  # recorder
        for batch in loader:
            state, metrics = train_step(state, batch)
            history.append(float(metrics['loss']))
            recorder(state, metrics, batch)  # recorder
    return history


def replayed():
    return train_step, create_train_state(jax.random.key(0))
