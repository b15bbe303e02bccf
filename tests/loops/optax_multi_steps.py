"""Plain JAX and optax: gradients of four steps are accumulated, and then applied."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn

optimizer = optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=4)


def predict(params, x):
    for weights, bias in params[:-1]:
        x = jnp.tanh(jnp.dot(x, weights) + bias[None])
    weights, bias = params[-1]
    return jnp.dot(x, weights) + bias[None]


def loss_fn(params, batch):
    return jnp.mean(optax.huber_loss(predict(params, batch['x']), batch['y']))


@jax.jit
def train_step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, {'loss': loss, 'grad_norm': optax.tree.norm(grads)}


def batches(size=4):
    rng = np.random.default_rng()
    while True:
        x = rng.normal(size=(size, 4)).astype(np.float32)
        yield {'x': x, 'y': np.abs(x[:, :2])}


def init_params(sizes=(4, 10, 2)):
    keys = jax.random.split(jax.random.PRNGKey(0), len(sizes))
    shapes = itertools.pairwise(sizes)
    return [(jax.random.normal(k, s) / 2, jnp.zeros(s[1])) for k, s in zip(keys[1:], shapes, strict=True)]


def main(loader, directory):
    params = init_params()
    opt_state = optimizer.init(params)
    history = []
    with jaxrnn.Recorder(directory, (params, opt_state), checkpoint_every=10) as recorder:  # recorder
        params, opt_state = recorder.state  # recorder
        for batch in loader:
            params, opt_state, metrics = train_step(params, opt_state, batch)
            history.append(float(metrics['loss']))
            recorder((params, opt_state), metrics, batch)  # recorder
    return history


def replayed():
    def step(state, batch):
        params, opt_state, metrics = train_step(*state, batch)
        return (params, opt_state), metrics

    params = init_params()
    return step, (params, optimizer.init(params))
