"""Plain JAX: a call takes several updates, one after the other under lax.scan, and consumes its carry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn

INNER = 5
tx = optax.sgd(0.05, momentum=0.9, nesterov=True)


def loss_fn(params, x, y):
    hidden = jax.nn.silu(x @ params['w1'] + params['b1'][None])
    return jnp.mean(jnp.square(hidden @ params['w2'] - y))


@functools.partial(jax.jit, donate_argnames='carry')
def train_many(carry, batches):
    def body(carry, batch):
        params, opt_state, step = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, step + 1), loss

    carry, losses = jax.lax.scan(body, carry, batches)
    return carry, {'loss': losses.mean(), 'last_loss': losses[-1]}


def batches(size=8):
    """Batches of INNER batches."""
    rng = np.random.default_rng(11)
    while True:
        x = rng.normal(size=(INNER, size, 3)).astype(np.float32)
        yield x, (x[..., :1] - x[..., 1:2]) ** 2 / 4


def init(key):
    first, second = jax.random.split(key)
    params = {
        'w1': jax.random.normal(first, (3, 16)) / 2,
        'b1': jnp.zeros(16),
        'w2': jax.random.normal(second, (16, 1)) / 4,
    }
    return params, tx.init(params), 0


def main(loader, directory):
    carry = init(jax.random.key(9))
    history = []
    with jaxrnn.Recorder(directory, carry, checkpoint_every=10) as recorder:  # recorder
        carry = recorder.state  # recorder
        for stacked in loader:
            carry, metrics = train_many(carry, stacked)
            history.append(float(metrics['last_loss']))
            recorder(carry, metrics, stacked)  # recorder
    return history


def replayed():
    return train_many, init(jax.random.key(9))
