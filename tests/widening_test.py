"""A step in float64 beside the same step written in float64, whatever types are written in it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from tolerance import assert_close

from jaxrnn import trace
from jaxrnn.errors import UserError

X = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
W = np.float32([0.3, -0.2, 0.1])


def over_time(dtype):
    def loss_of(w, x):
        def body(h, x_t):
            return jnp.tanh(h + x_t @ w).astype(dtype), None

        h, _ = lax.scan(body, jnp.zeros(4, dtype), x.swapaxes(0, 1))
        return jnp.mean((h - x[:, 0, 0]) ** 2)

    return loss_of


def in_a_loop(dtype):
    def loss_of(w, x):
        def body(n, h):
            return jnp.tanh(h + x[:, n] @ w).astype(dtype)

        return jnp.mean(lax.fori_loop(0, 5, body, jnp.ones(4, dtype)) ** 2)

    return loss_of


def until(dtype):
    def loss_of(w, x):
        first = (x[:, 0] @ w).astype(dtype)
        h = lax.while_loop(
            lambda h: h.sum() > 1e-3, lambda h: (h * 0.5).astype(dtype), lax.stop_gradient(first**2)
        )
        return jnp.mean((first + h) ** 2)

    return loss_of


def in_a_branch(dtype):
    def loss_of(w, x):
        h = (x[:, 0] @ w).astype(dtype)
        return jnp.mean(lax.cond(x.sum() > 0, lambda h: jnp.sin(h) ** 2, lambda h: jnp.zeros(4, dtype), h))

    return loss_of


def by_switch(dtype):
    def loss_of(w, x):
        h = jnp.where(x[:, 0, 0] > 0, 1, 2).astype(dtype) * (x[:, 1] @ w)
        return lax.switch(x.shape[0] - 3, [jnp.sum, jnp.mean, jnp.max], h.astype(dtype))

    return loss_of


def with_linear_algebra(dtype):
    def loss_of(w, x):
        a = (x.reshape(-1, 3).T @ x.reshape(-1, 3) + jnp.eye(3) * (1 + w @ w)).astype(dtype)
        low = jnp.linalg.cholesky(a)
        return jnp.sum(jnp.linalg.solve(a, w.astype(dtype))) + jnp.sum(low) + jnp.linalg.slogdet(a)[1]

    return loss_of


def with_scatter_sort_and_rest(dtype):
    def loss_of(w, x):
        h = (x @ w).astype(dtype)
        table = jnp.zeros(4, dtype).at[jnp.array([0, 1, 1, 3])].add(h[:, 0])
        top, _ = lax.top_k(h, 2)
        return jnp.sum(table**2) + jnp.sum(jnp.sort(h, 1)[:, 0]) + jnp.sum(jnp.cumsum(top)) + jnp.mean(
            jax.nn.logsumexp(h, 1)
        ) + jnp.sum(nn.max_pool(h[..., None], (2,)))  # fmt: skip

    return loss_of


def rematerialised(dtype):
    return jax.checkpoint(jax.jit(over_time(dtype)))


LOSSES = {f.__name__: f for f in (
    over_time, in_a_loop, until, in_a_branch, by_switch, with_linear_algebra, with_scatter_sort_and_rest,
    rematerialised,
)}  # fmt: skip
FORWARD_ONLY = ('until', 'in_a_loop')


def step_of(loss_of, gradient=True):
    def step(state, x):
        if not gradient:
            return state, {'loss': loss_of(state['w'], x)}
        loss, g = jax.value_and_grad(loss_of)(state['w'], x)
        return {'w': state['w'] - 0.125 * g}, {'loss': loss}

    return step


def wide(tree):
    def widen(x):
        return x.astype(np.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    return jax.tree.map(widen, tree)


@pytest.mark.parametrize('name', LOSSES)
def test_it_is_the_step_written_in_float64(name):
    gradient = name not in FORWARD_ONLY
    narrow, oracle = (step_of(LOSSES[name](dtype), gradient) for dtype in (jnp.float32, jnp.float64))
    with jax.enable_x64(True):
        state, batch = wide({'w': W}), wide(X)
        expected = jax.jit(oracle)(state, batch)
        found = jax.jit(trace.widened(narrow))(state, batch)
    jax.tree.map(lambda a, b: assert_close(a, b, 'float64'), found, expected)
    assert found[0]['w'].dtype == found[1]['loss'].dtype == np.float64
    plain = jax.jit(narrow)({'w': W}, X)  # which is further away than that
    assert float(plain[1]['loss']) != float(found[1]['loss'])


def rnn_with(optimiser):
    model = nn.RNN(nn.LSTMCell(4, dtype=jnp.float32), return_carry=True)

    def init():
        params = model.init(jax.random.key(0), X)
        return {'params': params, 'opt': optimiser.init(params), 'n': 0, 'key': jax.random.key(1)}

    def step(state, x):
        key, noise = jax.random.split(state['key'])

        def loss_of(params):
            (_, h), _ = model.apply(params, x + 0.1 * jax.random.normal(noise, x.shape))
            return jnp.mean((h - 1) ** 2)

        loss, g = jax.value_and_grad(loss_of)(state['params'])
        updates, opt = optimiser.update(g, state['opt'], state['params'])
        params = optax.apply_updates(state['params'], updates)
        return {'params': params, 'opt': opt, 'n': state['n'] + 1, 'key': key}, {'loss': loss}

    return init, step


@pytest.mark.parametrize(
    'optimiser', [optax.adam(1e-2), optax.MultiSteps(optax.adam(1e-2), 2)], ids=['adam', 'multi']
)
def test_a_loop_goes_on_with_the_types_that_it_began_with(optimiser):
    init, step = rnn_with(optimiser)
    state = narrow = init()
    traces = []

    def counted(state, x):
        traces.append(None)
        return trace.widened(step)(state, x)

    for _ in range(4):
        narrow, record = jax.jit(step)(narrow, X)
    with jax.enable_x64(True):
        state = wide({**state, 'n': jnp.int32(0)})
        types = jax.tree.map(lambda x: x.dtype, state)
        advance = jax.jit(counted)
        for _ in range(4):
            state, wide_record = advance(state, wide(X))
        assert jax.tree.map(lambda x: x.dtype, state) == types
    assert len(traces) == 1 and int(state['n']) == 4
    assert jax.random.key_data(state['key']).tolist() == jax.random.key_data(narrow['key']).tolist()
    # The same noise was drawn: in float32 it is the same run but for rounding.
    assert_close(wide_record['loss'], record['loss'], 'float32 forward')


def test_a_python_number_of_steps():
    def step(state, x):
        n = state['n'] + 1
        return {'n': n, 'w': state['w'] - x.mean() * 0.75**n}, {'loss': state['w'] / n}

    state, batch = {'n': 3, 'w': 1.5}, X
    with jax.enable_x64(True):
        made, _ = jax.device_get(jax.jit(trace.widened(step))(state, batch))
    assert made['n'] == 4 and made['w'].dtype == np.float64
    assert_close(made['w'], 1.5 - X.astype(float).mean() * 0.75**4, 'float64')
    assert trace.lost_precision(step, {'n': 3, 'w': np.float32(1.5)}, batch).lost is None


def test_types_that_the_step_is_trained_with():
    """In bfloat16, and traced so: its carry has the type of its weights."""

    def step(w, x):
        def body(h, x_t):
            return h + x_t @ w, None

        h, _ = lax.scan(body, jnp.zeros(4, jnp.bfloat16), x.astype(jnp.bfloat16).swapaxes(0, 1))
        return w, {'loss': h.sum()}

    like = W.astype(jnp.bfloat16), X
    with jax.enable_x64(True):
        _, record = jax.jit(trace.widened(step, like))(wide(W), wide(X))
    assert_close(record['loss'], np.sum(X.astype(float) @ W.astype(float)), 'float64')


def test_devices():
    mesh = jax.make_mesh((1,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec('d')

    def step(w, x):
        def mean(x):
            return lax.pmean(jnp.mean(x.astype(jnp.float32) @ w), 'd')

        return w, {
            'loss': jax.shard_map(mean, mesh=mesh, in_specs=over, out_specs=jax.sharding.PartitionSpec())(x)
        }

    with jax.enable_x64(True):
        _, record = jax.jit(trace.widened(step))(wide(W), wide(X))
    assert_close(record['loss'], np.mean(X.astype(float) @ W.astype(float)), 'float64')


def test_what_works_in_no_float64_is_said():
    def step(w, x):
        y = jax.pure_callback(lambda x: np.sin(x), jax.ShapeDtypeStruct((3,), jnp.float32), w)  # here
        return w, {'loss': y.sum()}

    line = step.__code__.co_firstlineno + 1
    with (
        jax.enable_x64(True),
        pytest.raises(UserError, match=f'widening_test.py:{line}: pure_callback does not work'),
    ):
        jax.jit(trace.widened(step))(wide(W), wide(X))


def test_nothing_of_float64_is_left_behind():
    jax.jit(trace.widened(step_of(over_time(jnp.float32))))({'w': W}, X)
    assert jnp.zeros(3).dtype == jnp.float32 and not jax.config.jax_enable_x64
