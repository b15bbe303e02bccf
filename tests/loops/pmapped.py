"""jax.pmap: each device has a copy of the parameters and a share of the batch; gradients are averaged over all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from flax.training.common_utils import shard

import jaxrnn

tx = optax.adam(1e-2)


def loss_fn(params, batch):
    logits = jnp.tanh(batch['x'] @ params['hidden']) @ params['output']
    return optax.sigmoid_binary_cross_entropy(logits[:, 0], batch['y']).mean()


@functools.partial(jax.pmap, axis_name='batch')
def train_step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    grads, loss = jax.lax.pmean((grads, loss), axis_name='batch')
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def batches(size=8):
    rng = np.random.default_rng()
    while True:
        x = rng.normal(size=(size, 3)).astype(np.float32)
        yield {'x': x, 'y': (x[:, 0] > 0).astype(np.float32)}


def init():
    first, second = jax.random.split(jax.random.key(2))
    params = {'hidden': jax.random.normal(first, (3, 8)), 'output': jax.random.normal(second, (8, 1))}
    return jax_utils.replicate((params, tx.init(params)))


def main(loader, directory):
    params, opt_state = init()
    history = []
    with jaxrnn.Recorder(directory, (params, opt_state), checkpoint_every=10) as recorder:  # recorder
        params, opt_state = recorder.state  # recorder
        for batch in map(shard, loader):
            params, opt_state, loss = train_step(params, opt_state, batch)
            history.append(float(loss[0]))
            recorder((params, opt_state), loss[0], batch)  # recorder
    return history


def replayed():
    def step(state, batch):
        params, opt_state, loss = train_step(*state, batch)
        return (params, opt_state), loss[0]

    return step, init()
