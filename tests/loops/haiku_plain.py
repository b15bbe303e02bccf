"""haiku: parameters and the optimiser's state are two variables of the loop, and there is nothing else."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn


def net_fn(x):
    return hk.nets.MLP([12, 12, 1], activation=jnp.tanh)(x)


network = hk.without_apply_rng(hk.transform(net_fn))
optimizer = optax.adam(3e-3)


def loss_fn(params, x, y):
    return jnp.mean(jnp.square(network.apply(params, x) - y))


@jax.jit
def update(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def batches(size=16):
    rng = np.random.default_rng(5)
    while True:
        x = rng.uniform(-1, 1, (size, 2)).astype(np.float32)
        yield x, np.sin(3 * x[:, :1]) * x[:, 1:]


def init():
    params = network.init(jax.random.PRNGKey(0), jnp.zeros((1, 2)))
    return params, optimizer.init(params)


def main(loader, directory):
    params, opt_state = init()
    history = []
    with jaxrnn.Recorder(directory, (params, opt_state), checkpoint_every=10) as recorder:  # recorder
        params, opt_state = recorder.state  # recorder
        for x, y in loader:
            params, opt_state, loss = update(params, opt_state, x, y)
            history.append(float(loss))
            recorder((params, opt_state), {'loss': loss}, (x, y))  # recorder
    return history


def replayed():
    def step(state, batch):
        params, opt_state, loss = update(*state, *batch)
        return (params, opt_state), {'loss': loss}

    return step, init()
