"""Curvature against dense Hessians in float64: of matrices drawn, and of our own networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from tolerance import assert_close

from jaxrnn import cells, curvature, scan, train, transforms


def quadratic(eigenvalues: np.ndarray):
    """A loss whose Hessian has these eigenvalues, of a tree of two leaves."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(eigenvalues.size,) * 2))[0]
    hessian = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)

    def loss_of(params):
        x = jnp.concatenate([params['a'], params['b'].ravel()])
        return x @ hessian @ x / 2

    x = rng.normal(size=eigenvalues.size)
    return loss_of, {'a': jnp.asarray(x[:4]), 'b': jnp.asarray(x[4:].reshape(2, -1))}, np.asarray(hessian)


@pytest.mark.parametrize('lowest', [0.5, -200.0])
def test_sharpness_of_a_known_spectrum(lowest):
    """The most positive eigenvalue, though another be larger in size; and never more than it."""
    with jax.enable_x64(True):
        loss_of, params, _ = quadratic(np.linspace(lowest, 7, 20))
        start = curvature.random_start(params)
        few, many = (
            jax.device_get(
                jax.jit(functools.partial(curvature.sharpness, loss_of, iterations=n))(params, start)
            )
            for n in (3, 500)
        )
    assert_close(many.eigenvalue, 7.0, 'float64')
    assert lowest < few.eigenvalue < 7 and many.residual < 1e-6 < few.residual
    assert np.min(np.abs(np.linspace(lowest, 7, 20) - few.eigenvalue)) <= few.residual


def test_one_iteration_a_step_follows_it():
    """Warm-started, while the preconditioner shrinks by a per mille a step."""
    with jax.enable_x64(True):
        loss_of, params, hessian = quadratic(np.linspace(0.5, 7, 20))
        scale = jax.tree.map(lambda x: 1 + 0.5 * jnp.sin(jnp.arange(float(x.size))).reshape(x.shape), params)
        vector = curvature.random_start(params)
        follow = jax.jit(functools.partial(curvature.preconditioned_sharpness, loss_of))
        for _ in range(300):
            scale = jax.tree.map(lambda x: 0.999 * x, scale)
            found = follow(params, scale, vector)
            vector = found.vector
        flat, found = np.asarray(ravel_pytree(scale)[0]), float(found.eigenvalue)
    exact = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(flat, flat)))[-1]
    assert 0.999 * exact < found <= exact * (1 + 1e-9)


CELLS = {'lstm': cells.lstm(cells.SIGMOID), 'gru': cells.gru_reset_after(cells.SIGMOID)}


def network(name: str):
    """A small recurrence of ours over letters, its loss in float64, some steps of Adam, and the Hessian of the plain
    scan by JAX."""
    rng = np.random.default_rng(0)
    gates = 3 * sum(CELLS[name].blocks)
    shapes = {'kernel': (5, gates), 'bias': (gates,), 'recurrent_kernel': (3, gates)}
    params = {shape: jnp.asarray(rng.normal(size=size)) for shape, size in shapes.items()}
    letters, targets = rng.integers(0, 5, (6, 8)), jnp.asarray(rng.normal(size=(8, 3)))

    def loss_of(params, *, reference=False):
        weights = scan.Weights(**params)
        _, last = scan.run(CELLS[name], weights, letters, sequences=False, reference=reference)
        return train.mean_squared_error(last.h, targets)

    adam = transforms.scale_by_adam(0.9, 0.999, 1e-7, epsilon_hat=True)
    state = adam.init(params)
    gradient = jax.jit(jax.grad(loss_of))
    for _ in range(3):
        updates, state = adam.update(gradient(params), state)
        params = jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates)
    flat, back = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda x: loss_of(back(x), reference=True)))(flat)
    return loss_of, params, state, np.asarray(hessian)


@pytest.mark.parametrize('name', CELLS)
def test_of_our_networks(name):
    with jax.enable_x64(True):
        loss_of, params, state, hessian = network(name)
        options = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-7, 'epsilon_hat': True}
        scale = curvature.preconditioner(state, **options)
        start = curvature.random_start(params)
        product = curvature.hessian_vector(loss_of, params, start)
        sharp = jax.jit(functools.partial(curvature.sharpness, loss_of, iterations=400))(params, start)
        warped = jax.jit(functools.partial(curvature.preconditioned_sharpness, loss_of, iterations=400))(
            params, scale, start
        )
        direction = jax.tree.map(jnp.divide, jax.grad(loss_of)(params), scale)
        kappa = curvature.update_curvature(loss_of, params, scale, direction)
        flat = [np.asarray(ravel_pytree(tree)[0]) for tree in (scale, start, product, direction)]
        sharp, warped, kappa = float(sharp.eigenvalue), float(warped.eigenvalue), float(kappa)
    p, v, hv, d = flat
    assert_close(hv, hessian @ v, 'float64 Hessian')
    assert_close(sharp, np.linalg.eigvalsh(hessian)[-1], 'float64 Hessian')
    exact = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(p, p)))[-1]
    assert_close(warped, exact, 'float64 Hessian')
    assert_close(kappa, d @ hessian @ d / (d @ (p * d)), 'float64 Hessian')
    assert kappa <= exact


@pytest.mark.parametrize('hat', [False, True])
def test_the_preconditioner_is_what_momentum_is_divided_by(hat):
    adam = transforms.scale_by_adam(0.9, 0.999, 1e-2, epsilon_hat=hat)
    params = {'x': jnp.zeros(4)}
    state = adam.init(params)
    for g in np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32):
        updates, state = adam.update({'x': jnp.asarray(g)}, state)
    scale = curvature.preconditioner(state, eps=1e-2, epsilon_hat=hat)
    assert_close(state.mu['x'] / scale['x'], updates['x'], 'float32 adam')


def test_limits_known_by_heart():
    """38/η by default, 2/η without momentum, 78/η at .95; the rule for ε of a curvature of 1."""
    assert_close(curvature.stable_below(1e-3), 38_000, 'float32 schedule')
    assert_close(curvature.stable_below(1e-3, 0.0), 2000, 'float32 schedule')
    assert_close(curvature.stable_below(1e-3, 0.95), 78_000, 'float32 schedule')
    assert_close(curvature.epsilon_for(1.0, 1e-3), 1e-3 / 38, 'float32 schedule')


def test_nothing_to_go_by():
    """No direction, and a start in the Hessian's null space: zeros, not NaNs."""
    with jax.enable_x64(True):
        loss_of, params, _ = quadratic(np.linspace(0.5, 7, 20))
        zeros, ones = (jax.tree.map(f, params) for f in (jnp.zeros_like, jnp.ones_like))
        assert curvature.update_curvature(loss_of, params, ones, zeros) == 0
        flat = curvature.sharpness(lambda params: 0.0 * params['a'][0], params, ones)
        assert flat.eigenvalue == 0 and flat.residual == 0


def test_beside_optax():
    """Somebody's own loop, of optax alone."""
    params = {'w': jnp.ones((3, 2)), 'b': jnp.zeros(2)}
    optimiser = optax.adam(1e-3)
    state = optimiser.init(params)
    loss_of = lambda params: jnp.sum(jnp.square(params['w'])) + jnp.sum(jnp.square(params['b'] - 1))  # noqa: E731
    _, state = optimiser.update(jax.grad(loss_of)(params), state, params)
    scale = curvature.preconditioner(state[0])
    follow = jax.jit(functools.partial(curvature.preconditioned_sharpness, loss_of, iterations=20))
    found = follow(params, scale, curvature.random_start(params))
    assert_close(found.eigenvalue, 2 / (0.1 * 2), 'float32 signal')
