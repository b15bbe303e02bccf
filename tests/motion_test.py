"""What a step did to its state, read from a few numbers of each tensor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrnn.record import motion, telemetry


def motion_of(before, after):
    return motion.of_step(motion.sampled(before), after)


def params_of(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        'w': jax.random.normal(keys[0], (40, 30)),
        'b': jax.random.normal(keys[1], (7,)),
        'n': jnp.int32(3),
    }


def test_norms_are_those_of_numpy():
    """Of tensors of up to 64 numbers all are read; of larger ones 64, evenly spread."""
    before = {
        'a': jnp.linspace(-1, 1, 64),
        'b': jnp.full((8, 8), 3.0),
        'key': jax.random.key(0),
        'n': jnp.int32(1),
    }
    after = {**before, 'a': before['a'] * 2, 'n': jnp.int32(2)}
    found = motion_of(before, after)
    both = np.concatenate([np.asarray(after['a']), np.asarray(after['b']).ravel()])
    moved = np.concatenate([np.asarray(before['a']), np.zeros(64)])
    np.testing.assert_allclose(found['state_rms'], np.sqrt(np.mean(both**2)), rtol=1e-6)
    np.testing.assert_allclose(found['state_moved'], np.sqrt(np.mean(moved**2)), rtol=1e-6)
    assert found['state_still'] == 0.5 and 'moments_fading' not in found
    large = {'a': jax.random.normal(jax.random.key(0), (300, 300))}
    found = motion_of(large, jax.tree.map(lambda x: x + 0.5, large))
    assert 0.4 < found['state_moved'] < 0.6 and 0.7 < found['state_rms'] < 1.6


def test_extremes_do_not_overflow():
    before = {'a': jnp.full(5, 1e30), 'b': jnp.full((2, 3), -2e38)}
    found = motion_of(before, before)
    assert np.isfinite(found['state_rms']) and found['state_moved'] == 0 and found['state_still'] == 1
    assert motion_of({'n': 1}, {'n': 2}) == {}
    assert motion_of({'a': jnp.zeros(0)}, {'a': jnp.zeros(0)}) == {}
    assert float(motion_of(1.0, 1.5)['state_moved']) == 0.5  # a state that is one Python number
    bad = motion_of({'a': jnp.ones(3)}, {'a': jnp.full(3, jnp.nan)})
    assert np.isnan(bad['state_moved'])


OPTIMISERS = {
    'adam': lambda: optax.adam(1e-3),
    'adamw': lambda: optax.adamw(1e-3, weight_decay=0.1),
    'adam, b1 of .95': lambda: optax.adam(1e-3, b1=0.95, b2=0.98),
    'momentum': lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    'lion': lambda: optax.lion(1e-3),
    'clipped': lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    'rates kept in the state': lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    'moments in bfloat16': lambda: optax.adam(1e-3, mu_dtype=jnp.bfloat16),
    'masked': lambda: optax.masked(optax.adam(1e-3), {'w': True, 'b': False}),
    'skips what is not finite': lambda: optax.apply_if_finite(optax.adam(1e-3), 5),
}


@pytest.mark.parametrize('name', OPTIMISERS)
def test_a_gradient_of_zero_is_seen_in_the_moments(name):
    optimiser = OPTIMISERS[name]()
    params = {path: leaf for path, leaf in params_of().items() if path != 'n'}
    state = params, optimiser.init(params)

    @functools.partial(jax.jit, static_argnums=1)
    def step(state, zero, seed):
        params, opt = state
        gradients = jax.tree.map(
            lambda x: 0 * x if zero else jax.random.normal(jax.random.key(seed), x.shape) * x, params
        )
        updates, opt = optimiser.update(gradients, opt, params)
        after = optax.apply_updates(params, updates), opt
        return after, motion_of(state, after)

    seen = []
    for number in range(12):
        state, record = step(state, number >= 6, number)
        seen.append(bool(record['moments_fading']))
    assert seen == [False] * 6 + [True] * 6


def test_a_step_that_was_not_taken_is_no_gradient_of_zero():
    """Micro-batches of which moments know nothing yet, and a step that a guard skipped."""
    for optimiser, gradient in (
        (optax.MultiSteps(optax.adam(1e-3), 4), 1.0),
        (optax.apply_if_finite(optax.adam(1e-3), 5), np.nan),
    ):
        params = {'w': jnp.ones((5, 5))}
        state = optimiser.init(params)
        for number in range(9):
            given = {'w': (gradient if number == 8 else 1.0 + number) * jnp.arange(25.0).reshape(5, 5)}
            _, after = optimiser.update(given, state, params)
            assert not motion_of({'opt': state}, {'opt': after})['moments_fading'], number
            state = after


def test_a_rate_of_zero_moves_nothing_but_means():
    for make in (
        optax.adam,
        lambda rate: optax.MultiSteps(optax.adamw(rate), 3),
        lambda rate: optax.sgd(rate, 0.9),
    ):
        optimiser = make(0.0)
        params = {'w': jnp.ones((4, 5))}
        state = params, optimiser.init(params)
        for number in range(4):
            updates, opt = optimiser.update(
                {'w': jnp.arange(20.0).reshape(4, 5) + number}, state[1], state[0]
            )
            after = optax.apply_updates(state[0], updates), opt
            assert motion_of(state, after)['state_moved'] == 0
            state = after


@pytest.mark.parametrize('b2', [0.9, 0.999])
def test_second_moments_that_were_set_back(b2):
    optimiser = optax.chain(optax.clip(1.0), optax.adam(1e-3, b2=b2))
    params = {'w': jnp.ones((6, 6))}
    state = optimiser.init(params)
    for number in range(9):
        lost = number == 5
        gradients = {'w': jax.random.normal(jax.random.key(number), (6, 6))}
        began = optax.tree.map_params(optimiser, jnp.zeros_like, state) if lost else state
        _, after = optimiser.update(gradients, began, params)
        share = float(motion_of({'opt': state, 'w': params}, {'opt': after, 'w': params})['moments_lost'])
        assert (share > 0.5) == lost, (number, share)
        state = after


def test_an_instrumented_step_has_them_and_its_own_fields_stay_its_own():
    def step(state, batch):
        return {'w': state['w'] - batch}, {'loss': state['w'].sum(), 'state_rms': jnp.float32(7)}

    observed = telemetry.instrument(step)
    _, seen = observed({'w': jnp.ones(4)}, jnp.float32(0.25), False)
    row = telemetry.row(0, seen)
    assert row['record_state_rms'] == 7 and row['state_rms'] == 0.75 and row['state_moved'] == 0.25
    assert 'state_rms' in motion.FIELDS and row['state_still'] == 0
