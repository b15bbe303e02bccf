"""Half precision: gradients of a scaled loss, whose scale goes down when they overflow, and up when they don't."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import dynamic_scale, train_state

import jaxrnn


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, dtype=jnp.float16)(x))
        return nn.Dense(1, dtype=jnp.float16)(x)


class TrainState(train_state.TrainState):
    dynamic_scale: Any


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        predictions = state.apply_fn({'params': params}, x).astype(jnp.float32)
        return jnp.mean((predictions - y) ** 2)

    grad_fn = state.dynamic_scale.value_and_grad(loss_fn)
    scale, is_finite, loss, grads = grad_fn(state.params)
    after = state.apply_gradients(grads=grads)

    def keep(new, old):
        return jnp.where(is_finite, new, old)

    after = after.replace(
        params=jax.tree.map(keep, after.params, state.params),
        opt_state=jax.tree.map(keep, after.opt_state, state.opt_state),
        dynamic_scale=scale,
    )
    return after, {'loss': loss, 'scale': scale.scale, 'is_finite': is_finite}


def batches(size=16):
    rng = np.random.default_rng()
    while True:
        x = rng.normal(size=(size, 4)).astype(np.float32)
        yield jnp.asarray(x), jnp.asarray(x[:, :1] + 0.5 * x[:, 1:2])


def create():
    model = Half()
    params = model.init(jax.random.key(4), jnp.zeros((1, 4)))['params']
    scale = dynamic_scale.DynamicScale(growth_interval=10)
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2), dynamic_scale=scale)


def main(loader, directory):
    state = create()
    history = []
    with jaxrnn.Recorder(directory, state, checkpoint_every=10) as recorder:  # recorder
        state = recorder.state  # recorder
        for x, y in loader:
            state, metrics = train_step(state, x, y)
            history.append(float(metrics['loss']))
            recorder(state, metrics, (x, y))  # recorder
    return history


def replayed():
    return lambda state, batch: train_step(state, *batch), create()
