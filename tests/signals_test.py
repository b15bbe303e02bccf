"""Signals against their formulas in float64; what must be found, what must not, and what can't be computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from tolerance import assert_close

from jaxrnn.detect import rule_language
from jaxrnn.optim import signals, transforms
from jaxrnn.rnn.signals import OF_LAYERS
from jaxrnn.types import UserError
from jaxrnn.words import config, optimisers, train
from jaxrnn.words.signals import SIGNALS

SHAPES = {'bias': (5,), 'kernel': (7, 5), 'long': (2500,), 'scalar': ()}
STEPS = 8
RATE, B1, B2, EPS = 3e-3, 0.9, 0.99, 1e-4

FORMS = {
    'ours': (transforms.scale_by_adam(B1, B2, EPS, epsilon_hat=False), False),
    'epsilon-hat': (transforms.scale_by_adam(B1, B2, EPS, epsilon_hat=True), True),
    "optax's": (optax.scale_by_adam(B1, B2, EPS), False),
}


def draw(seed: int) -> dict[str, jax.Array]:
    """Gradients of very different sizes, some of them so small that epsilon rules."""
    rng = np.random.default_rng(seed)
    scale = {'bias': 1e-1, 'kernel': 3.0 ** (seed % 4 - 2), 'long': 1e-4, 'scalar': 1}
    return {name: jnp.float32(scale[name] * rng.normal(size=shape)) for name, shape in SHAPES.items()}


class Step:
    """One Adam step after some others, with all that goes into its signals."""

    def __init__(self, adam=FORMS['ours'][0], steps=STEPS, params=None, rate=RATE, draw=draw, **signals):
        optimiser = optax.chain(optax.identity(), adam, optax.scale_by_learning_rate(rate))
        self.params = draw(99) if params is None else params
        self.options = {'learning_rate': rate, 'b1': B1, 'b2': B2, 'eps': EPS, **signals}
        state = optimiser.init(self.params)
        self.history, self.before = [], state
        for step in range(steps):
            self.gradients = draw(step)
            self.history.append(self.gradients)
            self.before = state
            self.updates, state = optimiser.update(self.gradients, state, self.params)
            self.params = optax.apply_updates(self.params, self.updates)
        self.state, self.before = signals_state(state), signals_state(self.before)

    def changed(self, **changes) -> 'Step':
        for name, value in changes.items():
            setattr(self, name, value)
        return self

    def measure(self, function=signals.of_adam, **options):
        """Inside a compiled step, as it is meant."""
        return jax.jit(functools.partial(function, **self.options, **options))(
            self.params, self.gradients, self.updates, self.state
        )


signals_state = signals.adam_state


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def oracle(step: Step, names: list[str], *, hat: bool) -> dict[str, float]:
    """The formulas, of the tensors of these names as one."""

    def joined(tree) -> np.ndarray:
        return np.concatenate([np.float64(tree[name]).ravel() for name in names])

    gs = [joined(g) for g in step.history]
    m = v = m_tm1 = np.zeros_like(gs[0])
    for g in gs:
        m_tm1 = m
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
    t = len(gs)
    m_hat, v_hat = m / (1 - B1**t), v / (1 - B2**t)
    epsilon = EPS / np.sqrt(1 - B2**t) if hat else EPS
    u, theta = -RATE * m_hat / (np.sqrt(v_hat) + epsilon), joined(step.params)
    terms = sum((B1**2 / B2) ** i for i in range(t))
    bound = (1 - B1) / (1 - B1**t) * np.sqrt((1 - B2**t) / (1 - B2) * terms)
    return {
        'update_rms': np.sqrt(np.mean(g * g / np.maximum(v_hat, epsilon**2))),
        'decoupling': 1 - np.mean(g * g) / np.mean(v_hat),
        'descent_cosine': cosine(u, -g),
        'saturated_ratio': np.mean(np.abs(m_hat) > 0.9 * np.sqrt(v_hat)),
        'step_rms': np.sqrt(np.mean(u * u)) / RATE,
        'momentum_cosine': cosine(g, m_tm1),
        'relative_step': np.linalg.norm(u) / np.linalg.norm(theta),
        'bound': np.max(np.abs(u)) / RATE / bound,
        'second_moment_broken': 0.0,
        **({} if len(names) > 1 else {'epsilon_margin': np.median(sampled(np.sqrt(v_hat))) / epsilon}),
    }


def sampled(x: np.ndarray) -> np.ndarray:
    return x[:: 2500 // signals.SAMPLE] if x.size == 2500 else x


@pytest.mark.parametrize('rows, parts', [(12, 4), (10, 4), (3, 3), (7, 2)])
def test_of_a_large_matrix_a_part_is_looked_at_and_in_turn_all(rows, parts, monkeypatch):
    """The signals of those rows, and the norms of all."""
    monkeypatch.setattr(signals, 'LARGE', 4 * rows)

    def draw_matrix(seed):
        return {'kernel': jnp.float32(np.random.default_rng(seed).normal(size=(rows, 4)))}

    block, seen = -(-rows // parts), set()
    for steps in range(20, 20 + parts):
        step = Step(steps=steps, draw=draw_matrix)
        found, whole = step.measure(parts=parts), step.measure()
        first = min(block * (steps % parts), rows - block)
        seen |= set(range(first, first + block))
        trees = (step.params, step.gradients, step.updates, step.state.mu, step.state.nu)
        params, gradients, updates, m, v = ({'kernel': one['kernel'][first : first + block]} for one in trees)
        state = optax.ScaleByAdamState(step.state.count, m, v)
        expected = signals.of_adam(params, gradients, updates, state, **step.options)
        for name in {signal.name for signal in signals.OF_ADAM} - {'epsilon_margin'}:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
        for name in ('gradient_norm', 'update_norm', 'parameter_norm', 'epsilon_margin'):
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-6, err_msg=name)
    assert seen == set(range(rows))


def test_beside_others_a_part_counts_for_all_of_its_matrix(monkeypatch):
    """Of a matrix whose rows are all alike each part tells what the whole would."""
    monkeypatch.setattr(signals, 'LARGE', 48)

    def draw_alike(seed):
        rng = np.random.default_rng(seed)
        row, bias = rng.normal(size=4), 3 * rng.normal(size=4)
        return {'kernel': jnp.float32(np.tile(row, (12, 1))), 'bias': jnp.float32(bias)}

    step = Step(draw=draw_alike)
    found, whole = step.measure(parts=4), step.measure()
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize('form', FORMS)
def test_formulas(form):
    adam, hat = FORMS[form]
    step = Step(adam, epsilon_hat=hat)
    each = {name: oracle(step, [name], hat=hat) for name in SHAPES}
    whole = oracle(step, list(SHAPES), hat=hat)
    measured = step.measure(signals.per_tensor)
    assert measured.keys() == SHAPES.keys()
    for name, expected in each.items():
        assert measured[name].keys() == expected.keys()
        for signal in expected:
            assert_close(measured[name][signal], expected[signal], 'float32 signal')
    record = step.measure()
    pick = {'highest': max, 'lowest': min}
    for signal in signals.OF_ADAM:
        values = [each[name][signal.name] for name in SHAPES]
        expected = whole[signal.name] if signal.worst == 'whole' else pick[signal.worst](values)
        assert_close(record[signal.name], expected, 'float32 signal')
    for name, of in {
        'gradient_norm': step.gradients,
        'update_norm': step.updates,
        'parameter_norm': step.params,
    }.items():
        flat = np.concatenate([np.float64(leaf).ravel() for leaf in of.values()])
        assert_close(record[name], np.linalg.norm(flat), 'float32 signal')


def test_a_flat_record_of_the_table():
    record = Step().measure()
    norms = {'gradient_norm', 'update_norm', 'parameter_norm'}
    assert record.keys() == {signal.name for signal in signals.OF_ADAM} | norms
    assert all(value.shape == () and value.dtype == jnp.float32 for value in record.values())
    for signal in SIGNALS:
        if signal.alarm:
            assert signal.name in rule_language.parse(signal.alarm).fields


def test_float64():
    with jax.enable_x64(True):
        step = Step(draw=lambda seed: {k: jnp.asarray(np.float64(v)) for k, v in draw(seed).items()})
        for name, value in step.measure(signals.per_tensor)['kernel'].items():
            assert value.dtype == np.float64
            assert_close(value, oracle(step, ['kernel'], hat=False)[name], 'float64')


# The bound.


@pytest.mark.parametrize(
    ('b1', 'b2'), [(0.9, 0.999), (0.9, 0.99), (0.9, 0.95), (0.9, 0.9), (0, 0.99), (0.5, 0.25)]
)
@pytest.mark.parametrize('steps', [1, 2, 10, 300])
def test_the_bound_is_tight(b1, b2, steps):
    """The gradients that attain it by Cauchy and Schwarz: in float64 Adam comes to it, and not beyond."""
    with jax.enable_x64(True):
        gs = (b1 / b2) ** np.arange(steps)[::-1]
        adam = transforms.scale_by_adam(b1, b2, 0, epsilon_hat=False)
        state = adam.init(jnp.zeros(()))
        for g in gs:
            u, state = adam.update(jnp.asarray(g), state)
        bound = signals.largest_ratio(state.count, b1, b2)
    assert_close(u, bound, 'float64')


def test_the_bound_known_by_heart():
    """Of causes-and-remedies: 7.270, 2.345, 1.165 for ever; 1 and 1.04 at the first and the tenth step."""
    for b2, expected in ((0.999, 7.270), (0.99, 2.345), (0.95, 1.165)):
        assert round(float(signals.largest_ratio(jnp.int32(100_000), 0.9, b2)), 3) == expected
    assert round(float(signals.largest_ratio(jnp.int32(10), 0.9, 0.999)), 2) == 1.04
    assert np.isinf(signals.largest_ratio(jnp.int32(3), 0.9, 0.5))


@pytest.mark.parametrize('form', FORMS)
def test_no_healthy_step_breaks_algebra(form):
    """Gradients that leap, stay away and die out, over 400 steps in float32, before and after 1 - b2^t is 1."""
    adam, hat = FORMS[form]
    rng = np.random.default_rng(0)
    scales = np.float32(10.0 ** rng.uniform(-12, 2, size=400) * (rng.random(400) < 0.6))
    gs = scales[:, None] * rng.normal(size=(400, 64)).astype(np.float32)

    def body(carry, g):
        params, state = carry
        u, after = adam.update(g, state, params)
        options = {'learning_rate': RATE, 'b1': B1, 'b2': B2, 'eps': EPS, 'epsilon_hat': hat}
        record = signals.of_adam(params, g, -RATE * u, after, before=state, **options)
        return (params, after), record

    params = jnp.ones(64)
    _, record = jax.jit(functools.partial(jax.lax.scan, body))((params, adam.init(params)), jnp.asarray(gs))
    assert np.max(record['second_moment_broken']) == 0
    assert 0.3 < np.max(record['bound']) < 1.0001
    assert all(np.all(np.isfinite(values)) for values in record.values())


# Planted.


def with_moment(step: Step, name: str, kernel: jax.Array) -> Step:
    moments = getattr(step.state, name)
    return step.changed(state=step.state._replace(**{name: {**moments, 'kernel': kernel}}))


@pytest.mark.parametrize('value', [-1e-9, 0.0, np.nan])
def test_a_broken_second_moment_is_found(value):
    step = Step()
    found = with_moment(step, 'nu', step.state.nu['kernel'].at[2, 3].set(value)).measure(signals.per_tensor)
    shares = {name: float(record['second_moment_broken']) for name, record in found.items()}
    assert shares == {'bias': 0, 'kernel': pytest.approx(1 / 35), 'long': 0, 'scalar': 0}
    assert float(step.measure()['second_moment_broken']) > 0


def test_a_second_moment_that_fell_too_fast_is_found_beside_the_one_before():
    """Halved, it may still be more than this step's gradient alone explains."""
    step = Step()
    quiet = step.state.nu['kernel'] > 2.1 * (1 - B2) * jnp.square(step.gradients['kernel'])
    halved = jnp.where(quiet, step.state.nu['kernel'] / 2, step.state.nu['kernel'])
    step = with_moment(step, 'nu', halved)
    assert float(step.measure()['second_moment_broken']) == 0
    shares = step.measure(signals.per_tensor, before=step.before)
    assert_close(shares['kernel']['second_moment_broken'], np.mean(quiet), 'float32 signal')


def test_a_step_longer_than_adam_can_take():
    step = Step()
    assert float(step.measure()['bound']) < 1
    longest = jnp.argmax(jnp.abs(step.updates['kernel']))
    step.updates['kernel'] = step.updates['kernel'].at[jnp.unravel_index(longest, (7, 5))].multiply(8)
    assert float(step.measure()['bound']) > 1.001


# What can't be computed.


def assert_finite(record) -> None:
    for name, value in record.items():
        assert np.isfinite(value), name


@pytest.mark.parametrize('steps', [1, 2])
def test_no_momentum_to_speak_of_has_no_direction(steps):
    """At the first step, and where a gradient is so large that the momentum's digits are lost in it."""

    def drawn(seed):
        return jax.tree.map(lambda x: 1e5 ** (seed % 99) * x, draw(seed))

    found = Step(steps=steps, draw=drawn).measure(signals.per_tensor)
    assert all(record['momentum_cosine'] == 0 for record in found.values())


def test_zero_gradients():
    step = Step(draw=lambda seed: jax.tree.map(jnp.zeros_like, draw(seed)), params=draw(0))
    record = step.measure()
    assert_finite(record)
    assert all(record[signal.name] == 0 for signal in signals.OF_ADAM)


def test_no_step_no_learning_rate_no_epsilon():
    assert_finite(Step(steps=1).measure())
    assert_finite(Step(rate=0.0).measure())
    bare = Step(transforms.scale_by_adam(B1, B2, 0, epsilon_hat=False), eps=0.0)
    assert_finite(bare.measure())
    step = Step()
    step.state = step.state._replace(count=jnp.int32(0))
    step.measure()  # no exception; 0 steps have no average


def test_empty_and_integer_tensors_are_left_out():
    step = Step()
    expected = step.measure()
    more = {'empty': jnp.zeros((0, 3)), 'whole': jnp.ones(3, jnp.int32)}
    for name in ('params', 'gradients', 'updates'):
        setattr(step, name, {**getattr(step, name), **more})
    step.state = step.state._replace(mu={**step.state.mu, **more}, nu={**step.state.nu, **more})
    assert step.measure(signals.per_tensor).keys() == SHAPES.keys()
    jax.tree.map(np.testing.assert_array_equal, step.measure(), expected)


def test_nothing_at_all():
    assert_finite(Step(draw=lambda seed: {}).measure())


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_shows(value):
    """Without an exception, and in its own tensor alone."""

    def drawn(seed):
        made = draw(seed)
        return {**made, 'kernel': made['kernel'].at[0, 0].set(value)} if seed == STEPS - 1 else made

    step = Step(draw=drawn)
    found = step.measure(signals.per_tensor)
    for name, record in found.items():
        if name == 'kernel':
            assert not np.isfinite(record['update_rms'])
        else:
            assert_finite(record)
    assert not np.isfinite(step.measure()['update_rms'])


def test_bfloat16_moments():
    step = Step(draw=lambda seed: jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(seed)))
    record = step.measure()
    assert_finite(record)
    assert {value.dtype for value in record.values()} == {jnp.dtype('float32')}
    assert record['second_moment_broken'] == 0


# Where Adam is.


def test_adam_is_found_in_any_chain():
    params = draw(0)
    for optimiser in (
        optax.adam(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        optax.inject_hyperparams(optax.adam)(1e-3),
        optax.masked(optax.adam(1e-3), {name: name != 'long' for name in SHAPES}),
        optimisers.build(
            config.Optimiser(clip='adaptive', schedule='plateau'), epsilon=1e-7, epsilon_hat=True
        ),
    ):
        assert isinstance(signals.adam_state(optimiser.init(params)), optax.ScaleByAdamState)


@pytest.mark.parametrize(
    'optimiser', [optax.sgd(1e-3), optax.chain(optax.scale_by_adam(), optax.scale_by_adam())]
)
def test_no_adam_or_two(optimiser):
    with pytest.raises(UserError, match=r'optimiser: [02] states'):
        signals.adam_state(optimiser.init(draw(0)))


def test_tensors_that_adam_does_not_move_are_left_out():
    optimiser = optax.masked(optax.adam(RATE), {name: name != 'long' for name in SHAPES})
    params, gradients = draw(0), draw(1)
    updates, state = optimiser.update(gradients, optimiser.init(params), params)
    found = signals.per_tensor(params, gradients, updates, signals.adam_state(state), learning_rate=RATE)
    assert found.keys() == SHAPES.keys() - {'long'}


# In the train step.


@pytest.mark.parametrize('clip', ['none', 'global_norm'])
def test_a_program_records_them_where_asked(clip):
    """Those of the step's own tensors; the rest of the record is the same."""
    records = []
    for wanted in (False, True):
        made = config.Config(
            model=config.Model(network='gru', hidden=8),
            optimiser=config.Optimiser(clip=clip, clip_threshold=1e-3, schedule='plateau'),
            training=config.Training(batch_size=8, signals=wanted),
        )
        program = train.make_program(made, small.dataset())
        step, state = jax.jit(program.step), program.init()
        for number in range(4):
            state, record = step(state, program.batch_at(number))
        records.append(record)
    plain, with_signals = records
    inside = {'saturated_update_gate', 'saturated_reset_gate', 'dead_update_gate', 'dead_reset_gate'}
    inside |= {'large_cells', 'memory', 'through_time', 'padding_gain'}
    assert with_signals.keys() - plain.keys() == {signal.name for signal in signals.OF_ADAM} | inside
    assert inside < {signal.name for signal in OF_LAYERS}
    for name, value in plain.items():
        assert_close(with_signals[name], value, 'float32 signal')
    assert 0 < with_signals['bound'] < 1.001 and with_signals['second_moment_broken'] == 0
    assert with_signals['momentum_cosine'] > 0.5 and with_signals['descent_cosine'] > 0.2
    assert 0 < with_signals['update_rms'] < 2.3
    assert 0 < with_signals['memory'] != 1 and with_signals['through_time'] > 0


def test_a_configuration_without_them_has_the_digest_it_had():
    """Runs of before can be gone on with; one with signals is another."""
    assert config.Config().digest() == 'c37d6bcec1a31e55'
    with_signals = config.Config(training=config.Training(signals=True))
    assert with_signals.digest() != config.Config().digest()


@pytest.mark.parametrize('network', small.NETWORKS)
def test_signals_change_no_bit_of_the_state(network):
    """So that a run can be trained again with them, to see what came before its symptom."""
    states = []
    for on in (False, True):
        program = train.make_program(small.configuration(network, hidden=24, signals=on), small.dataset())
        step, state = jax.jit(program.step), program.init()
        for number in range(6):
            state, _ = step(state, program.batch_at(number))
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, *states)
