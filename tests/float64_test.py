"""What float64 says of steps in which it is known where digits are lost."""

import inspect

import faulty
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxrnn import trace

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def line_of(function):
    lines, start = inspect.getsourcelines(function)
    return start + next(n for n, line in enumerate(lines) if '# here' in line)


def step_of(loss_of):
    def step(w, x):
        loss, g = jax.value_and_grad(loss_of)(w, x)
        return w - 0.1 * g, {'loss': loss}

    return step


def variance_by_squares(w, x):
    x = w * x + 3e3
    return jnp.mean(jnp.square(x)) - jnp.square(jnp.mean(x))  # here


def small_beside_large(w, x):
    small, large = 1e-4 * w * x, 1e5 * w  # of constants alone XLA would make x + (1e5 - 1e5)
    return 1e8 * jnp.mean(((large + small) - large) ** 2)  # here


def difference_of_exponentials(w, x):
    return 1e8 * jnp.mean((jnp.exp(1e-4 * w * x) - 1) ** 2)  # a thousandth is lost, no more


def through_linear_algebra(w, x):
    return jnp.mean(jnp.linalg.inv(w * (x.T @ x) + jnp.eye(5)))


def through_a_scatter_and_a_sort(w, x):
    return jnp.sum(jnp.zeros(4).at[jnp.array([0, 1, 1, 3, 2])].add(w * x[0]) ** 2) + jnp.sum(
        jnp.sort(w * x)[0]
    )


def through_a_branch_and_a_while(w, x):
    once = lax.cond(x.sum() > 0, lambda x: x * w, lambda x: x - w, x)
    return jnp.mean(lax.fori_loop(0, 3, lambda n, x: jnp.tanh(x), once))


@pytest.mark.parametrize(
    'loss_of',
    [variance_by_squares, small_beside_large],
    ids=lambda f: f.__name__,
)
def test_the_operation_that_loses_digits(loss_of):
    told = trace.lost_precision(step_of(loss_of), np.float32(1), X)
    lost = told.lost
    assert (lost.op, lost.pass_, lost.source) == ('sub', 'forward', f'{__file__}:{line_of(loss_of)}')
    assert lost.error >= 0.1 > 0.01 >= lost.of_operands
    assert told.outputs['record/loss'] >= 0.1


@pytest.mark.parametrize(
    'loss_of',
    [
        difference_of_exponentials,
        through_linear_algebra,
        through_a_scatter_and_a_sort,
        through_a_branch_and_a_while,
    ],
    ids=lambda f: f.__name__,
)
def test_nothing_is_lost(loss_of):
    told = trace.lost_precision(step_of(loss_of), np.float32(1), X)
    assert told.lost is None and max(told.outputs.values()) < 0.1
    assert set(told.outputs) == {'state', 'record/loss'}


def test_what_takes_no_float64_is_said():
    assert (
        'custom_linear_solve'
        in trace.lost_precision(step_of(through_linear_algebra), np.float32(1), X).restarted
    )
    assert trace.lost_precision(step_of(through_a_scatter_and_a_sort), np.float32(1), X).restarted == ()


def test_time_step_and_example():
    def step(w, xs):
        def loss_of(w):
            def body(h, x):
                return 0.5 * h + ((x * w + 1) - x), None  # here

            h, _ = lax.scan(body, jnp.zeros((3, 4)), xs)
            return jnp.mean(h**2)

        return step_of(lambda w, _: loss_of(w))(w, xs)

    xs = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
    xs[4, 1] = 3e8
    lost = trace.lost_precision(step, np.float32(1), xs, example_axes=1).lost
    assert (lost.time_step, lost.examples, lost.source) == (4, (1,), f'{__file__}:{line_of(step)}')


def test_an_update_that_is_too_small_beside_its_parameter():
    def step(w, x):
        g = jax.grad(lambda w: jnp.mean(x.astype(w.dtype) @ w))(w)
        return w - jnp.bfloat16(1e-3) * g, {'loss': jnp.sum(w)}  # here

    lost = trace.lost_precision(step, jnp.full(5, 3, jnp.bfloat16), X).lost
    assert (lost.op, lost.pass_, lost.source) == ('sub', 'update', f'{__file__}:{line_of(step)}')


def test_an_update_of_rounding_errors_alone_is_told():
    """The gradient is 0 but for rounding, and Adam makes a whole step of it."""

    def step(w, x):
        g = jax.grad(lambda w: jnp.sum(jax.nn.softmax(x + w, axis=1)))(w)
        return w - 0.1 * g / (jnp.abs(g) + 1e-12), {'loss': jnp.sum(w)}

    told = trace.lost_precision(step, np.float32(1), X)
    assert told.outputs['state'] >= 0.1 > told.outputs['record/loss']
    assert told.lost is not None


@pytest.mark.parametrize(
    'network',
    [
        'equinox',
        'gru',
        *(pytest.param(name, marks=pytest.mark.battery) for name in ('linen', 'lstm', 'plain')),
    ],
)
def test_healthy_steps_lose_nothing(network):
    subject = faulty.SUBJECTS[network]()
    state, batch = subject.init(), subject.batch(1, 2)
    state = jax.jit(subject.step)(state, batch)[0]
    told = trace.lost_precision(subject.step, state, batch)
    assert told.lost is None, told


def test_nothing_of_float64_is_left_behind():
    trace.lost_precision(step_of(through_a_scatter_and_a_sort), np.float32(1), X)
    assert jnp.zeros(3).dtype == jnp.float32 and not jax.config.jax_enable_x64
