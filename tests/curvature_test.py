"""Curvature against dense Hessians in float64: of matrices drawn, and of our own networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from jax.flatten_util import ravel_pytree
from tolerance import assert_close

from jaxrnn.optim import curvature, signals, transforms
from jaxrnn.record import telemetry
from jaxrnn.rnn import cells, scan
from jaxrnn.types import UserError
from jaxrnn.words import train


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


# While training.


def watched_run(steps, *, every=3, cap=0.0, rate=1e-3, curvatures=(1.0, 30.0, 400.0)):
    """Adam on a quadratic, watched: states and updates of each step."""
    loss_of = lambda params: jnp.sum(jnp.asarray(curvatures) * jnp.square(params['x'])) / 2  # noqa: E731
    chain = optax.with_extra_args_support(
        optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate))
    )
    optimiser = curvature.watched(chain, every, cap=cap)
    params = {'x': jnp.ones(len(curvatures))}
    state = optimiser.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimiser.update(
            jax.grad(loss_of)(params), state, params, loss_of=loss_of, rate=rate
        )
        return optax.apply_updates(params, updates), state, updates

    found = []
    for _ in range(steps):
        before = params
        params, state, updates = step(params, state)
        found.append((before, state, updates))
    return found, np.asarray(curvatures)


def test_watched_it_is_measured_every_so_many_steps():
    """Against the diagonal Hessian; between measurements the last one stands."""
    found, hessian = watched_run(60)
    for number, (_, state, updates) in enumerate(found):
        if number % 3:
            assert state.along == found[number - 1][1].along
            assert state.sharpness == found[number - 1][1].sharpness
            continue
        scale = np.asarray(curvature.preconditioner(transforms.adam_state(state.inner))['x'])
        u = np.asarray(updates['x'])
        along = np.sum(hessian * u * u) / np.sum(scale * u * u) / 38e3
        np.testing.assert_allclose(state.along, along, rtol=1e-4)
        assert state.sharpness <= np.max(hessian / scale) / 38e3 * (1 + 1e-4)
    np.testing.assert_allclose(found[57][1].sharpness, np.max(hessian / scale) / 38e3, rtol=0.05)


def test_watching_alone_changes_no_update():
    chain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))
    found, hessian = watched_run(10)
    state = chain.init(found[0][0])
    for before, _, updates in found:
        plain, state = jax.jit(chain.update)({'x': jnp.asarray(hessian) * before['x']}, state)
        np.testing.assert_allclose(updates['x'], plain['x'], rtol=1e-6)


def test_a_cap_holds_the_curvature_along_the_update():
    """At whatever step it is above: curvature times what is left of the rate is the cap."""
    free, hessian = watched_run(40, every=1, rate=0.3)
    capped, _ = watched_run(40, every=1, rate=0.3, cap=0.02)
    assert max(float(state.along) for _, state, _ in free) > 0.07
    factors = []
    for _, state, updates in capped:
        scale = np.asarray(curvature.preconditioner(transforms.adam_state(state.inner))['x'])
        adam = transforms.adam_state(state.inner)
        whole = -0.3 * np.asarray(adam.mu['x']) / scale
        factors.append(np.median(np.asarray(updates['x']) / whole))
        along = np.sum(hessian * whole**2) / np.sum(scale * whole**2) * 0.3 / 38
        np.testing.assert_allclose(state.along, along, rtol=1e-3)
        np.testing.assert_allclose(factors[-1], min(1, 0.02 / along), rtol=1e-3)
    assert min(factors) < 0.6


def test_what_cannot_be_measured_counts_as_nothing():
    loss_of = lambda params: jnp.sum(jnp.sqrt(params['x']))  # noqa: E731
    optimiser = curvature.watched(optax.with_extra_args_support(optax.adam(1e-3)), 1, cap=0.8)
    params = {'x': jnp.zeros(3)}
    updates, state = optimiser.update(
        {'x': jnp.ones(3)}, optimiser.init(params), params, loss_of=loss_of, rate=1e-3
    )
    assert state.along == 0 and state.sharpness == 0 and np.isfinite(updates['x']).all()
    assert np.isfinite(state.vector['x']).all()


@pytest.mark.parametrize('network', ['gru', 'stacked'])
def test_a_run_records_its_curvature(network):
    made = small.configuration(network).changed(curvature_every=2)
    program = train.make_program(made, small.dataset())
    step, state = telemetry.instrument(program.step), program.init()
    records = []
    for number in range(4):
        state, observation = step(state, program.batch_at(number), True)
        records.append(observation.record)
    for name in ('preconditioned_sharpness', 'update_curvature'):
        values = [float(record[name]) for record in records]
        assert values[0] == values[1] != values[2] == values[3]
        assert name in {signal.name for signal in signals.OTHERS}


def test_a_cap_needs_measurements():
    with pytest.raises(UserError, match='--curvature_every: 0 found'):
        train.make_program(small.configuration().changed(curvature_cap=0.8), small.dataset())
