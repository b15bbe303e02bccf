"""linen: a TrainState with a running mean of its parameters; the step consumes the state that it is given."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

import jaxrnn


class MLP(nn.Module):
    features: tuple[int, ...] = (16, 1)

    @nn.compact
    def __call__(self, x):
        for size in self.features[:-1]:
            x = nn.tanh(nn.Dense(size)(x))
        return nn.Dense(self.features[-1])(x)


class EMAState(train_state.TrainState):
    ema_params: Any = None
    decay: float = 0.99

    def apply_gradients(self, *, grads, **kwargs):
        after = super().apply_gradients(grads=grads, **kwargs)
        mean = optax.incremental_update(after.params, self.ema_params, 1 - self.decay)
        return after.replace(ema_params=mean)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    inputs, targets = batch

    def loss_fn(params):
        return optax.l2_loss(state.apply_fn(params, inputs), targets).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def batches(size=16):
    rng = np.random.default_rng(7)
    while True:
        inputs = rng.uniform(-2, 2, (size, 3)).astype(np.float32)
        yield inputs, np.prod(inputs, axis=1, keepdims=True)


def create():
    model = MLP()
    params = model.init(jax.random.key(1), jnp.zeros((1, 3)))
    mean = jax.tree.map(jnp.copy, params)
    return EMAState.create(apply_fn=model.apply, params=params, ema_params=mean, tx=optax.adam(3e-3))


def main(loader, directory):
    state = create()
    history = []
    with jaxrnn.Recorder(directory, state, checkpoint_every=10) as recorder:  # recorder
        state = recorder.state  # recorder
        for batch in loader:
            state, loss = train_step(state, batch)
            history.append(float(loss))
            recorder(state, loss, batch)  # recorder
    return history


def replayed():
    return train_step, create()
