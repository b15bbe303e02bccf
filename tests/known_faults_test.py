"""Adam's own spikes, in loops that take seconds: warned of before they come, and averted by what should avert them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import jaxrnn
from jaxrnn import detect
from jaxrnn.detect import rule_language
from jaxrnn.experiment.outcome import Change, Changed
from jaxrnn.optim import curvature, signals, transforms
from jaxrnn.words import config, optimisers, train
from jaxrnn.words.remedies import MECHANISMS
from jaxrnn.words.signals import ALARMS


def train_on(loss_of, params, *, steps: int, rate: float = 1e-3, b2: float = 0.999, eps: float = 1e-8):
    """Every step's loss, signals, and both curvatures over what is stable; columns as of a run's records."""
    options = {'b1': 0.9, 'b2': b2, 'eps': eps}
    optimiser = optax.chain(
        transforms.scale_by_adam(epsilon_hat=False, **options), optax.scale_by_learning_rate(rate)
    )
    limit = curvature.stable_below(rate)

    def step(carry, _):
        params, opt_state, vector = carry
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        params, state = optax.apply_updates(params, updates), signals.adam_state(opt_state)
        scale = curvature.preconditioner(state, **options)
        sharp = curvature.preconditioned_sharpness(loss_of, params, scale, vector)
        direction = jax.tree.map(jnp.divide, gradients, scale)
        record = {
            'loss': loss,
            'preconditioned_sharpness': sharp.eigenvalue / limit,
            'update_curvature': curvature.update_curvature(loss_of, params, scale, direction) / limit,
            **signals.of_adam(params, gradients, updates, state, learning_rate=rate, **options),
        }
        return (params, opt_state, sharp.vector), record

    @jax.jit
    def run(params):
        carry = params, optimiser.init(params), curvature.random_start(params)
        return jax.lax.scan(step, carry, length=steps)[1]

    columns = {name: np.asarray(values, np.float64) for name, values in run(params).items()}
    return {'step': np.arange(steps, dtype=float), **columns}


def first(holds: np.ndarray) -> int:
    return int(np.flatnonzero(holds)[0])


# One dimension, curvature 1: nothing gets sharper but Adam's own preconditioner.


@functools.cache
def quadratic(eps: float):
    with jax.enable_x64(True):
        return train_on(lambda x: jnp.square(x) / 2, jnp.ones(()), steps=6000, b2=0.99, eps=eps)


def test_a_quadratic_spikes_once_v_has_decayed():
    """The crossing is the one that was derived, and 86 steps before the peak."""
    columns = quadratic(1e-8)
    loss = columns['loss']
    crossed = first(columns['preconditioned_sharpness'] > 1)
    assert abs(crossed - 2863) <= 1
    assert np.argmax(loss[2500:3500]) + 2500 == 2949 and loss[:crossed].min() < 1e-70 and loss[2949] > 1e-8
    symptom = detect.first(detect.by_name('spike'), columns)
    assert crossed < symptom.step < 2949
    warned = dict(detect.onsets(columns, symptom))
    assert abs(warned['preconditioned_sharpness'] - crossed) <= 1
    assert warned['update_curvature'] < crossed and 'momentum_cosine' in warned
    assert np.all(columns['bound'] < 1.001) and not np.any(columns['second_moment_broken'])


def test_the_rule_for_epsilon_separates():
    """2.6e-5 still spikes, 3e-5 never does; the rule says 2.63e-5."""
    assert 2.6e-5 < curvature.epsilon_for(1.0, 1e-3) < 3e-5
    spiking, quiet = quadratic(2.6e-5), quadratic(3e-5)
    assert np.max(spiking['loss'][2500:]) > 1e-13 and np.max(spiking['preconditioned_sharpness']) > 1
    assert np.max(quiet['loss'][2500:]) < 1e-50 and np.max(quiet['preconditioned_sharpness']) < 1


# A linear regression whose every residual can be fitted: https://datascience.stackexchange.com/questions/25024


@functools.cache
def regression(seed: int, eps: float = 1e-8):
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.normal(size=size).astype(np.float32)) for size in ((64, 1000), 64))
    return train_on(lambda w: jnp.mean(jnp.square(x @ w - y)), jnp.zeros(1000), steps=3500, eps=eps)


LEAP = detect.custom('loss > 2 * median(loss, 200) and loss > 1e-9')
"""Above the float32 noise of a loss of 1e-14, in which factors of 2 are everyday."""


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_fitted_regression_leaps(seed):
    columns = regression(seed)
    leap = detect.first(LEAP, columns)
    assert np.max(columns['loss'][300:1000]) < 1e-12 and np.max(columns['loss'][leap.step :]) > 1e-7
    warned = dict(detect.onsets(columns, leap))
    for signal in (
        'preconditioned_sharpness',
        'update_curvature',
        'momentum_cosine',
        'step_rms',
        'update_rms',
    ):
        assert leap.step - 400 < warned[signal] < leap.step, signal


def test_a_regression_with_enough_epsilon_does_not():
    columns = regression(0, 3e-3)
    assert detect.first(LEAP, columns) is None
    assert np.max(columns['preconditioned_sharpness'][1:]) < 1


# Why: the same loops recorded and diagnosed, with Adam's own options for changes.

BEFORE = config.Optimiser(learning_rate=1e-3, epsilon=1e-8)
"""Stock Adam."""

CHANGES = {
    'AMSGrad': ('second-moment decay', {'second_moment': 'amsgrad'}),
    'epsilon by the rule': ('second-moment decay', {}),
    'update clipping': ('outrun second moment', {'update_clip': 1.0}),
    'norm clipping': ('outlying gradients', {'clip': 'global_norm', 'clip_threshold': 1.0}),
    'half the rate': ('', {'learning_rate': 5e-4}),
}
"""Name -> the mechanism that it takes away, and the options that it is."""


def diagnosed(loss_of, params, directory, *, before, sharpness: float, steps: int, when: str = ''):
    """Records a loop and diagnoses it. `sharpness`: the loss's largest curvature, which the rule for epsilon needs."""

    def step_of(options):
        optimiser = optimisers.build(options, epsilon=1e-8, epsilon_hat=False)

        def step(state, batch):
            loss, gradients = jax.value_and_grad(loss_of)(state['params'])
            updates, opt_state = optimiser.update(gradients, state['opt_state'], state['params'], value=loss)
            record = signals.of_adam(
                state['params'], gradients, updates, signals.adam_state(opt_state),
                learning_rate=options.learning_rate, b2=options.b2,
            )  # fmt: skip
            params = optax.apply_updates(state['params'], updates)
            return {'params': params, 'opt_state': opt_state}, {'loss': loss, **record}

        return step, lambda: {'params': params, 'opt_state': optimiser.init(params)}

    def no_batch(step):
        return ()

    def change(name):
        removes, options = CHANGES[name]
        if name == 'epsilon by the rule':
            options = {'epsilon': float(curvature.epsilon_for(sharpness, before.learning_rate))}
        after = dataclasses.replace(before, **options)

        def convert(state):
            opt_state = optimisers.convert(state['opt_state'], before, after, state['params'])
            return {**state, 'opt_state': opt_state}

        return Change(
            name,
            'optimiser',
            lambda: Changed(step_of(after)[0], no_batch, convert),
            removes=MECHANISMS.get(removes),
        )

    step, init = step_of(before)
    jaxrnn.record(step, no_batch, init, directory, max_steps=steps)
    made = [change(name) for name in CHANGES]
    return jaxrnn.diagnose(step, no_batch, directory, made, like=init, when=when)


def test_the_cause_of_the_quadratics_spike_is_named(tmp_path):
    with jax.enable_x64(True):
        diagnosis, told = diagnosed(
            lambda x: jnp.square(x) / 2, jnp.ones(()), tmp_path, steps=2960, sharpness=1.0,
            before=dataclasses.replace(BEFORE, b2=0.99),
        )  # fmt: skip
    assert diagnosis.symptom.kind == 'spike' and diagnosis.onset_step < diagnosis.symptom.step
    assert diagnosis.cause.kind == 'optimiser' and diagnosis.cause.why.startswith('second-moment decay ('), (
        diagnosis.cause
    )
    outcomes = {outcome.change.name: outcome.verdict for outcome in told.outcomes}
    assert outcomes['AMSGrad'] == outcomes['epsilon by the rule'] == 'averted' != outcomes['norm clipping']


def test_the_cause_of_the_regressions_leap_is_named(tmp_path):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=size).astype(np.float32)) for size in ((64, 1000), 64))
    largest = float(2 * np.linalg.norm(x, 2) ** 2 / 64)
    diagnosis, told = diagnosed(
        lambda w: jnp.mean(jnp.square(x @ w - y)), jnp.zeros(1000), tmp_path, steps=2700, sharpness=largest,
        before=BEFORE, when=LEAP.rule.text,
    )  # fmt: skip
    assert diagnosis.onset_step < diagnosis.symptom.step
    assert diagnosis.cause.kind == 'optimiser' and diagnosis.cause.why.startswith('second-moment decay ('), (
        diagnosis.cause
    )
    outcomes = {outcome.change.name: outcome.verdict for outcome in told.outcomes}
    assert outcomes['AMSGrad'] == outcomes['epsilon by the rule'] == 'averted' != outcomes['norm clipping']


# Healthy.


def test_healthy_runs_are_hardly_warned_of():
    """Noisy as batches of 8 make them: any alarm is on in less than 2 % of the steps."""
    made = small.configuration('gru', signals=True)
    program = train.make_program(made, small.dataset())
    run = jax.jit(lambda state, batches: jax.lax.scan(program.step, state, batches)[1])
    shares = []
    for seed in range(3):
        seeded = train.make_program(small.configuration('gru', signals=True, seed=seed), small.dataset())
        batches = [seeded.batch_at(step) for step in range(1500)]
        record = run(seeded.init(), jax.tree.map(lambda *xs: np.stack(xs), *batches))
        columns = {'step': np.arange(1500.0), **{n: np.asarray(v, np.float64) for n, v in record.items()}}
        assert detect.symptoms(columns) == []
        usable = detect.applicable(columns, ALARMS)
        assert len(usable) == 13
        shares.append(np.mean(np.logical_or.reduce([rule_language.holds(w.rule, columns) for w in usable])))
    assert config.Training().signals is False and np.mean(shares) < 0.02
