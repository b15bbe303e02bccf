"""Adam's signals of a state alone: beside those of a step that hands over its gradients; and where nothing is said."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrnn.detect import fields
from jaxrnn.optim import signals, transforms
from jaxrnn.record import adam, telemetry
from jaxrnn.trace import averages

RATE = 1e-3


def small_params():
    return {'dense': {'w': jax.random.normal(jax.random.key(0), (16, 16)), 'b': jnp.zeros(16)}}


def batch(number):
    return jax.random.normal(jax.random.key(number), (8, 16))


def program(optimiser, params, more=(), wholly=False, **adam_of):
    """A step of somebody's own; with `wholly` its record has what `signals.of_adam` says of all its numbers."""

    def loss(params, x):
        out = jnp.tanh(x @ params['dense']['w']) + params['dense']['b'][None]
        return jnp.mean(jnp.square(out - x))

    def step(state, x):
        value, gradients = jax.value_and_grad(loss)(state['params'], x)
        updates, opt = optimiser.update(gradients, state['opt'], state['params'])
        after = optax.apply_updates(state['params'], updates)
        record = {'loss': value}
        if wholly:
            clipped = optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())[0]
            given = (after, clipped, updates, signals.adam_state(opt))
            was = signals.adam_state(state['opt'])
            record |= signals.of_adam(*given, before=was, learning_rate=RATE, **adam_of)
        return {**state, 'params': after, 'opt': opt}, record

    return step, {'params': params, 'opt': optimiser.init(params), **dict(more)}


def rows(step, state, number=30):
    observed, found = telemetry.instrument(step), []
    state = jax.tree.map(jnp.copy, state)
    for place in range(number):
        state, seen = observed(state, batch(place), False)
        found.append(telemetry.row(place, seen))
    return found


CONSTANTS = {
    'adamw': (lambda: optax.adamw(RATE), (0.9, 0.999, 1e-8)),
    'others': (lambda: optax.adam(RATE, b1=0.95, b2=0.98, eps=1e-6), (0.95, 0.98, 1e-6)),
    'no mean': (lambda: optax.adam(RATE, b1=0.0, b2=0.9), (0.0, 0.9, 1e-8)),
    'clipped, with a schedule': (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(RATE, 9))),
        (0.9, 0.999, 1e-8),
    ),
    'nadam': (lambda: optax.nadam(RATE), (0.9, 0.999, 1e-8)),
    'masked': (
        lambda: optax.masked(optax.adam(RATE), {'dense': {'w': True, 'b': False}}),
        (0.9, 0.999, 1e-8),
    ),
    'our own': (
        lambda: transforms.scale_by_adam(0.9, 0.99, 1e-8, epsilon_hat=False),
        (0.9, 0.99, None),
    ),
}


@pytest.mark.parametrize('name', CONSTANTS)
def test_constants_are_read_from_the_program(name):
    make, (b1, b2, eps) = CONSTANTS[name]
    step, state = program(make(), small_params())
    for one in (step, jax.jit(step), jax.jit(jax.checkpoint(step))):
        found = adam.constants_of(one, state, batch(0))
        assert found == (b1, b2, eps), one


SILENT = {
    'not in every step': lambda: optax.MultiSteps(optax.adam(RATE), 2),
    'guarded': lambda: optax.apply_if_finite(optax.adam(RATE), 5),
    'not written in the program': lambda: optax.inject_hyperparams(optax.adam)(learning_rate=RATE),
    'kept in few digits': lambda: optax.adam(RATE, mu_dtype=jnp.bfloat16),
    'no Adam': lambda: optax.sgd(RATE, momentum=0.9),
    'two': lambda: optax.chain(optax.adam(RATE), optax.adam(RATE)),
    'the largest so far': lambda: optax.amsgrad(RATE),
}


@pytest.mark.parametrize('name', SILENT)
def test_nothing_is_said_where_no_gradient_follows(name):
    step, state = program(SILENT[name](), small_params())
    assert adam.constants_of(step, state, batch(0)) is None
    assert not {*rows(step, state, 2)[1]} & {*adam.FIELDS}


def test_a_step_of_several_updates_says_nothing():
    step, state = program(optax.adam(RATE), small_params())

    def twice(state, x):
        state, records = jax.lax.scan(step, state, jnp.stack([x, x]))
        return state, {'loss': records['loss'][-1]}

    assert adam.constants_of(twice, state, batch(0)) is None


def test_averages_of_other_forms():
    found = {
        'lerp': lambda m, g: m + 0.25 * (g - m),
        'other order': lambda m, g: g * 0.25 + m * 0.75,
        'in a call': lambda m, g: jax.jit(lambda a, b: 0.75 * a + b)(m, 0.25 * g),
        'a cast': lambda m, g: (jnp.float32(0.75) * m.astype(jnp.float32) + g).astype(jnp.float32),
        'from the call': lambda m, g: jax.jit(lambda b, x: b * x)(0.75, m) + g,
    }
    for name, function in found.items():
        assert averages.decay(jax.make_jaxpr(function)(jnp.ones(3), jnp.ones(3)), 0, 0) == 0.75, name
    none = {
        'in one branch': lambda m, g: jnp.where(g > 0, 0.75 * m + 0.25 * g, m),
        'of another': lambda m, g: 0.75 * g + 0.25 * g,
        'by a number that is given': lambda m, g: g[0] * m + g,
        'a sum': lambda m, g: m + g,
        'the other way': lambda m, g: m + 0.25 * (m - g),
        'unchanged': lambda m, g: m,
    }
    for name, function in none.items():
        assert averages.decay(jax.make_jaxpr(function)(jnp.ones(3), jnp.ones(3)), 0, 0) is None, name


def test_all_numbers_of_small_tensors_are_read():
    """Then they are those of the gradients themselves, but for rounding."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))
    found = rows(*program(optimiser, small_params()))
    wanted = rows(*program(optimiser, small_params(), wholly=True))
    for mine, theirs in list(zip(found, wanted, strict=True))[1:]:
        for name in adam.FIELDS:
            tolerance = {'decoupling': 1e-3, 'epsilon_margin': 0.1}.get(name, 1e-4)
            bound = tolerance * max(1e-3, abs(theirs[name]))
            assert mine[name] == pytest.approx(theirs[name], abs=max(bound, 1e-5)), (mine['step'], name)


def test_large_tensors_are_estimated():
    keys = jax.random.split(jax.random.key(1), 2)
    params = {'dense': {'w': jax.random.normal(keys[0], (16, 3000)) / 4, 'b': jnp.zeros(3000)}}
    optimiser = optax.adam(RATE)

    def made(wholly):
        def step(state, x):
            target = jnp.tile(x, (1, 188))[:, :3000]
            value, gradients = jax.value_and_grad(
                lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p['dense']['w']) + p['dense']['b'][None] - target))
            )(state['params'])
            updates, opt = optimiser.update(gradients, state['opt'])
            after = optax.apply_updates(state['params'], updates)
            record = {'loss': value}
            if wholly:
                record |= signals.of_adam(after, gradients, updates, opt[0], learning_rate=RATE)
            return {'params': after, 'opt': opt}, record

        return rows(step, {'params': params, 'opt': optimiser.init(params)}, 12)[-1]

    mine, theirs = made(False), made(True)
    for name in ('gradient_norm', 'update_norm', 'parameter_norm', 'step_rms', 'update_rms'):
        assert mine[name] == pytest.approx(theirs[name], rel=0.2), name
    for name in ('descent_cosine', 'momentum_cosine', 'saturated_ratio'):
        assert mine[name] == pytest.approx(theirs[name], abs=0.15), name


def test_a_moment_that_is_set_by_somebody_else_is_seen():
    step, state = program(optax.adam(RATE), small_params())

    def broken(state, x):
        after, record = step(state, x)
        first, *others = after['opt']
        wrong = jnp.where(first.count == 7, 0.98, 1.0)
        nu = jax.tree.map(lambda v: v * wrong, first.nu)
        return {**after, 'opt': (first._replace(nu=nu), *others)}, record

    # What follows the average is no average any more: the program doesn't say by what v decays.
    assert adam.constants_of(broken, state, batch(0)) is None
    observed, found = telemetry.instrument(step), []
    for place in range(12):
        if place == 7:
            first, *others = state['opt']
            state = {**state, 'opt': (first._replace(mu=jax.tree.map(lambda m: 50 * m, first.mu)), *others)}
        state, seen = observed(state, batch(place), False)
        found.append(telemetry.row(place, seen))
    assert [row['step'] for row in found if row['bound'] > 1.001][:3] == [7, 8, 9]


def test_parameters_are_taken_where_it_is_clear_which_they_are():
    params = small_params()
    step, state = program(optax.adam(RATE), params)
    assert 'relative_step' in rows(step, state, 2)[1]
    step, state = program(optax.adam(RATE), params, more={'average': params})
    assert 'relative_step' not in (row := rows(step, state, 2)[1]) and 'step_rms' in row


def test_fields_of_the_step_stay_its_own():
    step, state = program(optax.adam(RATE), small_params())

    def named(state, x):
        after, record = step(state, x)
        return after, {'objective value': record['loss'], 'bound': jnp.float32(-3)}

    row = rows(named, state, 2)[1]
    assert row['bound'] == -3 and row['gradient_norm'] > 0
    assert (
        fields.loss_of({name: value for name, value in row.items() if name != 'bound'}).field
        == 'objective value'
    )


def test_what_is_read_is_of_the_state_that_was_given():
    """Not of the state that came out last, where somebody hands over another."""
    step, state = program(optax.sgd(0.0), small_params())
    observed = telemetry.instrument(step)
    state, _ = observed(state, batch(0), False)
    moved = []
    for number in range(4):
        if number == 2:
            state = jax.tree.map(lambda x: x + 1, state)
        before = jax.tree.map(np.asarray, state)
        state, seen = observed(state, batch(0), False)
        moved.append((telemetry.row(0, seen)['state_moved'], before['params']['dense']['b'][0]))
    assert [m for m, _ in moved] == [0.0] * 4


EXPLICIT = """
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxrnn.record import telemetry

mesh = jax.make_mesh((2,), ('d',), axis_types=(AxisType.Explicit,))
with jax.set_mesh(mesh):
    place = NamedSharding(mesh, PartitionSpec('d', None))
    w = jax.device_put(jnp.ones((8, 6)), place)
    optimiser = optax.adam(1e-2)

    def step(state, target):
        w, opt = state
        loss, g = jax.value_and_grad(lambda w: jnp.mean((w - target) ** 2))(w)
        updates, opt = optimiser.update(g, opt)
        return (optax.apply_updates(w, updates), opt), {'loss': loss}

    observed, state = telemetry.instrument(step), (w, optimiser.init(w))
    for number in range(3):
        state, seen = observed(state, 1.5, False)
        print(sorted(telemetry.row(number, seen)))
"""


def test_a_mesh_with_explicit_axes_has_no_signals_and_goes_on():
    env = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    done = subprocess.run([sys.executable, '-c', EXPLICIT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['finite_state', 'loss', 'step']"] * 3


def test_where_each_device_has_its_own_nothing_is_said():
    """As under jax.pmap, where each counts for itself."""
    params = {'w': jnp.ones((2, 8, 6))}
    step, (params, opt) = jax.vmap(optax.adam(RATE).update), (params, jax.vmap(optax.adam(RATE).init)(params))

    def train(state, batch):
        params, opt = state
        updates, opt = step({'w': batch}, opt)
        return (optax.apply_updates(params, updates), opt), {'loss': jnp.sum(batch)}

    observed = telemetry.instrument(train)
    _, seen = observed((params, opt), jnp.ones((2, 8, 6)), False)
    assert not {*telemetry.row(0, seen)} & {*adam.FIELDS}
