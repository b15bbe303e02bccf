"""equinox: a model with functions among its leaves, under filter_jit; the loop splits the keys of the dropout."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import jaxrnn


class Model(eqx.Module):
    layers: list
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        first, second = jr.split(key)
        self.layers = [
            eqx.nn.Linear(3, 12, key=first),
            jax.nn.softplus,
            eqx.nn.Linear(12, 'scalar', key=second),
        ]
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, key):
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.layers[-1](self.dropout(x, key=key))


optim = optax.adam(1e-2)


@eqx.filter_value_and_grad
def loss_fn(model, x, y, key):
    predictions = jax.vmap(model)(x, jr.split(key, x.shape[0]))
    return jnp.mean((predictions - y) ** 2)


@eqx.filter_jit
def make_step(model, opt_state, x, y, key):
    loss, grads = loss_fn(model, x, y, key)
    updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, loss


def batches(size=8):
    x = np.random.default_rng(3).normal(size=(64, 3)).astype(np.float32)
    y = x[:, 0] * x[:, 1]
    while True:
        permutation = np.random.default_rng().permutation(64)
        for start in range(0, 64, size):
            chosen = permutation[start : start + size]
            yield x[chosen], y[chosen]


def init():
    model = Model(jr.key(0))
    return model, optim.init(eqx.filter(model, eqx.is_inexact_array))


def main(loader, directory):
    model, opt_state = init()
    key = jr.key(1)
    history = []
    with jaxrnn.Recorder(directory, (model, opt_state), checkpoint_every=10) as recorder:  # recorder
        model, opt_state = recorder.state  # recorder
        for x, y in loader:
            key, subkey = jr.split(key)
            model, opt_state, loss = make_step(model, opt_state, x, y, subkey)
            history.append(loss.item())
            recorder((model, opt_state), loss, (x, y, subkey))  # recorder
    return history


def replayed():
    def step(state, batch):
        model, opt_state, loss = make_step(*state, *batch)
        return (model, opt_state), loss

    return step, init()
