"""jax.shard_map: each device has a slice of the parameters, of the moments and of the batch; parameters are gathered
for a step, and each device gets the mean gradient of its slice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn

tx = optax.adam(1e-2)
mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
sliced = NamedSharding(mesh, P('data'))


def loss_fn(params, batch):
    logits = jnp.tanh(batch['x'] @ params['hidden'] + params['bias'][None]) @ params['output']
    return optax.sigmoid_binary_cross_entropy(logits[:, 0], batch['y']).mean()


def gathered(params):
    return jax.tree.map(lambda x: jax.lax.all_gather(x, 'data', tiled=True), params)


def mean_slice(grads):
    return jax.tree.map(lambda g: jax.lax.psum_scatter(g, 'data', tiled=True) / mesh.size, grads)


def device_step(params, batch):
    loss, grads = jax.value_and_grad(loss_fn)(gathered(params), batch)
    return jax.lax.pmean(loss, 'data'), mean_slice(grads)


loss_and_grads = jax.shard_map(
    device_step, mesh=mesh, in_specs=P('data'), out_specs=(P(), P('data')), check_vma=False
)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, batch):
    loss, grads = loss_and_grads(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def batches(size=8):
    rng = np.random.default_rng()
    while True:
        x = rng.normal(size=(size, 4)).astype(np.float32)
        yield {'x': x, 'y': (x[:, 0] > 0).astype(np.float32)}


def init():
    first, second = jax.random.split(jax.random.key(2))
    params = {
        'hidden': jax.random.normal(first, (4, 8)),
        'bias': jnp.zeros(8),
        'output': jax.random.normal(second, (8, 1)),
    }
    params = jax.device_put(params, sliced)
    return params, tx.init(params)


def main(loader, directory):
    params, opt_state = init()
    history = []
    with jaxrnn.Recorder(directory, (params, opt_state), checkpoint_every=10) as recorder:  # recorder
        params, opt_state = recorder.state  # recorder
        for batch in loader:
            batch = jax.device_put(batch, sliced)
            params, opt_state, loss = train_step(params, opt_state, batch)
            history.append(float(loss))
            recorder((params, opt_state), loss, batch)  # recorder
    return history


def replayed():
    def step(state, batch):
        params, opt_state, loss = train_step(*state, batch)
        return (params, opt_state), loss

    return step, init()
