"""Clippings, schedules and both Adams against float64 formulas; one battery over every choice there is."""

import dataclasses
import itertools
import math
import re

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from jaxrnn.optim import transforms
from jaxrnn.rnn import cells
from jaxrnn.types import UserError
from jaxrnn.words import config, optimisers, train
from jaxrnn.words.data import Batch

CHOICES = {field.name: field.metadata['choices'] for field in dataclasses.fields(config.Optimiser)}
STEPS = 14
SHAPES = {'bias': (4,), 'kernel': (3, 4)}


def draw(seed: int, scale: float = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS = draw(0)
GRADIENTS = [draw(1 + step, scale=3.0 ** (step % 4 - 2)) for step in range(STEPS)]  # some clipped, some not
LOSSES = np.float32([3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])  # falls, then stays


WARM_UPS = {'ZCLIP_WARMUP': 5, 'ADAGC_WARMUP': 4, 'SPAM_WARMUP': 3}


@pytest.fixture
def early(monkeypatch):
    """Clippings that set in while these few steps last."""
    for name, steps in WARM_UPS.items():
        monkeypatch.setattr(transforms, name, steps)


def each(clip):
    return lambda gs: [clip(g) for g in gs]


CLIPS = {
    'none': lambda gs: gs,
    'global_norm': each(lambda g: formulas.clip_global_norm(g, 0.7)),
    'per_leaf': each(lambda g: formulas.clip_per_leaf(g, 0.7)),
    'adaptive': each(lambda g: formulas.clip_adaptive(g, PARAMS, 0.7)),
    'zclip': lambda gs: formulas.zclip(gs, 0.4, warmup=5),
    'adagc': lambda gs: formulas.adagc(gs, 1.1, 0.7, warmup=4),
    'spam': lambda gs: gs,
}


def cosine(o: config.Optimiser, step: int) -> float:
    done = min((step - o.warmup_steps) / (o.decay_steps - o.warmup_steps), 1)
    return o.end_learning_rate + (o.learning_rate - o.end_learning_rate) * (1 + np.cos(np.pi * done)) / 2


def exponential(o: config.Optimiser, step: int) -> float:
    decays = (step - o.warmup_steps) / o.decay_steps
    return max(o.learning_rate * o.decay_rate**decays, o.end_learning_rate)


def piecewise(o: config.Optimiser, step: int) -> float:
    return o.learning_rate * o.decay_rate ** sum(step >= int(at) for at in o.boundaries.split(','))


def plateau(o: config.Optimiser, step: int) -> float:
    """Losses are averaged over windows; a window no better than the best by 1e-4 is a bad one; as many bad
    ones in a row as the patience says lower the rate, from the next step on."""
    best, bad, factor = np.inf, 0, 1.0
    for start in range(0, step - o.plateau_window + 1, o.plateau_window):
        average = np.mean(LOSSES[start : start + o.plateau_window], dtype=np.float64)
        best, bad = (average, 0) if average < (1 - 1e-4) * best else (best, bad + 1)
        if bad == o.plateau_patience:
            bad, factor = 0, factor * o.decay_rate
    return factor


SCHEDULES = {
    'constant': lambda o, step: o.learning_rate,
    'warmup_cosine': cosine,
    'exponential': exponential,
    'piecewise': piecewise,
    'plateau': lambda o, step: o.learning_rate,
}


def rate(o: config.Optimiser, step: int) -> float:
    """Of the step numbered from 0."""
    factor = plateau(o, step) if o.schedule == 'plateau' else 1
    if step < o.warmup_steps:
        return factor * o.learning_rate * step / o.warmup_steps
    return factor * SCHEDULES[o.schedule](o, step)


def options_of(clip: str, schedule: str, *, warmup_steps: int = 2, **changes) -> config.Optimiser:
    return config.Optimiser(
        **{
            'clip': clip,
            'schedule': schedule,
            'clip_threshold': 0.7,
            'zclip_threshold': 0.4,
            'adagc_threshold': 1.1,
            'spam_threshold': 4.0,
            'warmup_steps': warmup_steps,
            'decay_steps': 10,
            'end_learning_rate': 2e-4,
            'boundaries': '5,9',
            'plateau_patience': 2,
            'plateau_window': 2,
            **changes,
        }
    )


def build(options: config.Optimiser, preset: str = 'keras3') -> optax.GradientTransformationExtraArgs:
    chosen = cells.PRESETS[preset]
    return optimisers.build(options, epsilon=chosen.epsilon, epsilon_hat=chosen.epsilon_hat)


def run(optimiser: optax.GradientTransformationExtraArgs) -> tuple[list[dict], list]:
    """The updates of all steps, and the states before each and after the last; compiled once."""
    traces = []

    @jax.jit
    def update(state, gradients, loss):
        traces.append(1)
        return optimiser.update(gradients, state, PARAMS, value=loss, **CURVED)

    updates, states = [], [optimiser.init(PARAMS)]
    for gradients, loss in zip(GRADIENTS, LOSSES, strict=True):
        made, state = update(states[-1], gradients, loss)
        updates.append(made)
        states.append(state)
    assert len(traces) == 1
    return updates, states


def described(tree) -> tuple:
    """What a compiled function is chosen by."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, getattr(leaf, 'weak_type', False)) for leaf in leaves]


EPSILONS = {'keras1': (1e-8, True), 'keras3': (1e-7, True), 'flax': (1e-8, False)}


def in_float64(gradients: list[dict]) -> list[dict]:
    return [{name: np.float64(leaf) for name, leaf in g.items()} for g in gradients]


def assert_follows_the_formulas(options: config.Optimiser, preset: str) -> None:
    updates, _ = run(build(options, preset))
    clipped = CLIPS[options.clip](in_float64(GRADIENTS))
    epsilon, hat = EPSILONS[preset]
    limits = {'theta': 4.0, 'spam_warmup': 3} if options.clip == 'spam' else {}
    if options.update_clip:
        limits['d'] = options.update_clip
    if options.moment_dtype == 'bfloat16':
        limits['keep'] = lambda x: np.float64(jnp.bfloat16(x))
    for name in SHAPES:
        steps = formulas.adam(
            [g[name] for g in clipped], 0.9, 0.999, epsilon,
            hat=hat, second_moment=options.second_moment, corrected=options.bias_correction, **limits,
        )  # fmt: skip
        for number, (step, update) in enumerate(zip(steps, updates, strict=True)):
            assert_close(update[name], -rate(options, number) * step, 'float32 adam')


@pytest.mark.parametrize('schedule', CHOICES['schedule'])
@pytest.mark.parametrize('clip', CHOICES['clip'])
def test_clippings_and_schedules(clip, schedule, early):
    assert_follows_the_formulas(options_of(clip, schedule), 'keras3')


@pytest.mark.parametrize('clip', CHOICES['clip'][1:])
def test_every_clipping_clips_some_steps_and_not_others(clip, early):
    """So that the formulas above are told apart."""
    updates, _ = run(build(options_of(clip, 'constant', warmup_steps=0)))
    plain, _ = run(build(options_of('none', 'constant', warmup_steps=0)))
    same = [
        all(np.array_equal(a[name], b[name]) for name in SHAPES) for a, b in zip(updates, plain, strict=True)
    ]
    assert same[0] and not all(same)


@pytest.mark.parametrize('preset', cells.PRESETS)
@pytest.mark.parametrize('second_moment', CHOICES['second_moment'])
@pytest.mark.parametrize('update_clip', [0.0, 0.8])
def test_presets_and_moments(update_clip, second_moment, preset):
    chosen = options_of('global_norm', 'warmup_cosine', second_moment=second_moment, update_clip=update_clip)
    assert_follows_the_formulas(chosen, preset)


@pytest.mark.parametrize('second_moment', CHOICES['second_moment'])
def test_spam_with_every_moment(second_moment, early):
    chosen = options_of('spam', 'constant', second_moment=second_moment, update_clip=0.8)
    assert_follows_the_formulas(chosen, 'flax')


@pytest.mark.parametrize('preset', ['keras1', 'flax'])
@pytest.mark.parametrize('changes', [{}, {'update_clip': 0.8}, {'second_moment': 'amsgrad'}])
def test_without_the_correction_of_bias(changes, preset):
    chosen = options_of('none', 'constant', warmup_steps=0, bias_correction=False, **changes)
    assert_follows_the_formulas(chosen, preset)
    (first, *_), _ = run(build(chosen, preset))
    assert np.max(np.abs(first['bias'])) == pytest.approx(
        3.16e-3 if 'update_clip' not in changes else 8e-5, rel=0.05
    )


@pytest.mark.parametrize('second_moment', CHOICES['second_moment'])
def test_moments_in_bfloat16(second_moment):
    chosen = options_of('none', 'constant', moment_dtype='bfloat16', second_moment=second_moment)
    assert_follows_the_formulas(chosen, 'keras3')
    state = build(chosen).init(PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype('bfloat16')}


def test_v_in_bfloat16_does_not_fall():
    """A thousand steps of no gradient: float32's v falls by 1 - e^-1, bfloat16's stands still."""
    for name, left in (('float32', np.exp(-1)), ('bfloat16', 1)):
        optimiser = build(options_with(moment_dtype=name))
        state = optimiser.update(GRADIENTS[0], optimiser.init(PARAMS), PARAMS, value=1.0)[1]
        none = jax.tree.map(np.zeros_like, GRADIENTS[0])
        step = jax.jit(lambda state: optimiser.update(none, state, PARAMS, value=1.0)[1])  # noqa: B023
        after = state
        for _ in range(1000):
            after = step(after)
        ratio = np.float32(after[1].nu['bias']) / np.float32(state[1].nu['bias'])
        np.testing.assert_allclose(ratio, left, rtol=1e-2)


def options_with(**chosen) -> config.Optimiser:
    return options_of(chosen.pop('clip', 'none'), chosen.pop('schedule', 'constant'), **chosen)


EVERY_CHOICE = [
    *({'clip': clip, 'schedule': schedule} for clip in CHOICES['clip'] for schedule in CHOICES['schedule']),
    *({'second_moment': name} for name in CHOICES['second_moment']),
    {'update_clip': 1.0},
    {'spectral_cap': 0.05},
    {'bias_correction': False},
    {'moment_dtype': 'bfloat16'},
    {'moment_dtype': 'bfloat16', 'second_moment': 'amsgrad', 'guard': True},
    {'guard': True},
    {'guard': True, 'spectral_cap': 0.05, 'schedule': 'plateau', 'second_moment': 'amsgrad', 'clip': 'adagc'},
    {'guard': True, 'spectral_cap': 0.05, 'update_clip': 1.0, 'clip': 'zclip', 'second_moment': 'yogi'},
    {'curvature_every': 3},
    {
        'curvature_every': 3,
        'curvature_cap': 0.8,
        'guard': True,
        'second_moment': 'amsgrad',
        'schedule': 'plateau',
    },
]

CURVED = {
    'rate': 1e-3,
    'loss_of': lambda params: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)),
}
"""What an update takes besides, for those that watch the curvature."""


@pytest.mark.parametrize('chosen', EVERY_CHOICE, ids=str)
def test_the_state_keeps_its_structure(chosen):
    optimiser = build(options_with(**chosen))
    state = optimiser.init(PARAMS)
    again = jax.jit(lambda state: state)(state)
    assert described(again) == described(state)
    for leaf, same in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert np.array_equal(leaf, same)
    updates, after = jax.eval_shape(
        lambda state: optimiser.update(GRADIENTS[0], state, PARAMS, value=jnp.float32(1), **CURVED), state
    )
    assert described(after) == described(state)
    assert described(updates) == described(PARAMS)


@pytest.mark.parametrize('warmup_steps', [0, 1, 4])
@pytest.mark.parametrize('schedule', CHOICES['schedule'])
def test_the_learning_rate_told_is_the_one_applied(schedule, warmup_steps):
    options = options_of('none', schedule, warmup_steps=warmup_steps)
    updates, states = run(build(options))
    plain, _ = run(build(config.Optimiser(learning_rate=1)))
    told = jax.jit(lambda step, state: optimisers.current_learning_rate(options, step, state))
    for step in range(STEPS):
        applied = updates[step]['kernel'] / plain[step]['kernel']
        found = told(step, states[step])
        assert found.dtype == jnp.float32
        assert_close(applied, np.full((3, 4), found), 'float32 schedule')
        assert_close(found, rate(options, step), 'float32 schedule')


@pytest.mark.parametrize('schedule', CHOICES['schedule'])
def test_the_step_records_the_learning_rate_applied(schedule):
    options = options_of('none', schedule)
    optimiser = build(options)

    def told(state):
        return optimisers.current_learning_rate(options, state.step, state.opt_state)

    step = jax.jit(train.make_step(lambda params, letters: 0 * params['kernel'], optimiser, told))
    state = train.TrainState(jnp.int32(0), PARAMS, optimiser.init(PARAMS))
    for number, loss in enumerate(LOSSES):
        batch = Batch(
            np.zeros((2, 3), np.int32), np.full((3, 4), np.sqrt(loss)), np.arange(3, dtype=np.int32)
        )
        state, record = step(state, batch)
        assert_close(record['loss'], loss, 'float32 function')
        assert_close(record['learning_rate'], rate(options, number), 'float32 schedule')


@pytest.mark.parametrize('schedule', CHOICES['schedule'])
def test_the_learning_rate_told_under_a_guard_is_the_one_applied(schedule):
    """A skipped step leaves the schedule where it was."""
    options = options_of('none', schedule, guard=True)
    optimiser = build(options)
    update = jax.jit(lambda state, loss: optimiser.update(GRADIENTS[0], state, PARAMS, value=loss))
    told = jax.jit(lambda step, state: optimisers.current_learning_rate(options, step, state))
    state, rates = optimiser.init(PARAMS), []
    for step, loss in enumerate(np.insert(LOSSES, [0, 3, 3, 7], np.nan)):
        found = told(step, state)
        assert found.dtype == jnp.float32
        updates, state = update(state, loss)
        if np.isfinite(loss):
            rates.append(found)
        else:
            assert not np.any(updates['kernel'])
    assert state.skipped == 4
    for step, found in enumerate(rates):
        assert_close(found, rate(options, step), 'float32 schedule')


def test_schedules_by_hand():
    """Peak 1e-3, warm-up of 2 steps, decay by step 10, half at 5 and 9."""
    expected = {
        'constant': {0: 0, 1: 5e-4, 2: 1e-3, 13: 1e-3},
        'warmup_cosine': {0: 0, 1: 5e-4, 2: 1e-3, 6: 6e-4, 10: 2e-4, 13: 2e-4},
        'exponential': {0: 0, 1: 5e-4, 2: 1e-3, 12: 5e-4, 22: 2.5e-4, 32: 2e-4},
        'piecewise': {0: 0, 1: 5e-4, 2: 1e-3, 4: 1e-3, 5: 5e-4, 8: 5e-4, 9: 2.5e-4, 100: 2.5e-4},
        'plateau': {0: 0, 1: 5e-4, 2: 1e-3, 13: 1e-3},
    }
    assert expected.keys() == set(CHOICES['schedule'])
    for schedule, rates in expected.items():
        found = optimisers.learning_rate(options_of('none', schedule))
        for step, value in rates.items():
            assert_close(found(step), value, 'float32 schedule')


def test_plateau_reacts():
    """Windows of 2 steps average 2.5, 2, 1, 1, 1, 1, 1: the second bad one ends with step 9, the fourth
    with step 13. Here are the scales before each step and after the last."""
    _, states = run(build(options_of('none', 'plateau', warmup_steps=0)))
    assert [float(state[-1].scale) for state in states] == [1.0] * 10 + [0.5] * 4 + [0.25]


def test_plateau_survives_a_loss_that_is_nan():
    optimiser = build(options_of('none', 'plateau', warmup_steps=0))
    state = optimiser.init(PARAMS)
    for loss in (3.0, float('nan'), 1.0, 1.0):
        _, state = optimiser.update(GRADIENTS[0], state, PARAMS, value=jnp.float32(loss))
    assert state[-1].best_value == 1.0
    assert state[-1].scale == 1.0


def test_adam_by_hand():
    """First step, g = 2, epsilon = 0.1: algorithm 1 makes 2 / (sqrt(4) + 0.1); epsilon hat makes
    sqrt(0.001) / 0.1 * 0.2 / (sqrt(0.004) + 0.1)."""
    for hat, expected in ((False, 0.9523810), (True, 0.3874259)):
        optimiser = optimisers.build(config.Optimiser(learning_rate=1), epsilon=0.1, epsilon_hat=hat)
        params, gradient = jnp.zeros(1), jnp.full(1, 2.0)
        update, _ = optimiser.update(gradient, optimiser.init(params), params, value=0.0)
        assert_close(update, [-expected], 'float32 adam')


@pytest.mark.parametrize('hat', [False, True])
def test_options_reach_adam(hat):
    """b1, b2 and an epsilon that comes before the preset's."""
    options = config.Optimiser(b1=0.5, b2=0.75, epsilon=0.3, learning_rate=1)
    updates, _ = run(optimisers.build(options, epsilon=1e-8, epsilon_hat=hat))
    for name in SHAPES:
        steps = formulas.adam([g[name] for g in in_float64(GRADIENTS)], 0.5, 0.75, 0.3, hat=hat)
        for step, update in zip(steps, updates, strict=True):
            assert_close(update[name], -step, 'float32 adam')


@pytest.mark.parametrize('hat', [False, True])
def test_adam_is_optaxs_in_float64(hat):
    """Epsilon hat is optax's with a falling epsilon. optax's float32 loses digits of 1 - b2^t."""
    ours, b2, epsilon = transforms.scale_by_adam(0.9, 0.999, 0.01, epsilon_hat=hat), 0.999, 0.01
    state = ours.init(PARAMS)
    with jax.enable_x64(True):
        other = optax.scale_by_adam(0.9).init(jax.tree.map(np.float64, PARAMS))
    for t, gradients in enumerate(GRADIENTS, 1):
        found, state = ours.update(gradients, state)
        with jax.enable_x64(True):
            theirs = optax.scale_by_adam(0.9, b2, epsilon / np.sqrt(1 - b2**t) if hat else epsilon)
            expected, other = theirs.update(jax.tree.map(np.float64, gradients), other)
        for name in SHAPES:
            assert expected[name].dtype == np.float64
            assert_close(found[name], expected[name], 'float32 adam')
            assert_close(state.mu[name], other.mu[name], 'float32 adam')
            assert_close(state.nu[name], other.nu[name], 'float32 adam')
        assert state.count == other.count == t


def test_buffers_of_a_new_state_can_all_be_donated():
    state = build(config.Optimiser()).init(PARAMS)
    donate = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    donate(state)


def clipped_by_leaf(max_norm: float, *leaves) -> list[np.ndarray]:
    clip = transforms.clip_by_leaf_norm(max_norm)
    found, _ = clip.update([jnp.asarray(leaf, jnp.float32) for leaf in leaves], clip.init(None))
    return [np.asarray(leaf) for leaf in found]


def test_clip_by_leaf_norm_by_hand():
    long, short, matrix = clipped_by_leaf(2.5, [3, -4], [0.6, 0.8], [[1, 5], [5, 7]])
    assert_close(long, [1.5, -2], 'float32 function')
    assert_close(short, np.float32([0.6, 0.8]), 'exact')
    assert_close(matrix, [[0.25, 1.25], [1.25, 1.75]], 'float32 function')


@pytest.mark.parametrize('max_norm', [0.5, 2.0])
def test_clip_by_leaf_norm_at_the_ends(max_norm):
    with jax.debug_nans(False):
        poisoned, zero, tiny, large = clipped_by_leaf(
            max_norm, [np.nan, 1], [0, -0.0], [1e-30, -1e-35], [1e18, 0]
        )
    assert np.isnan(poisoned[0])
    assert np.array_equal(zero, [0, 0])
    assert_close(tiny, np.float32([1e-30, -1e-35]), 'exact')  # whose square is 0
    assert_close(large, [max_norm, 0], 'float32 function')


def test_clip_by_leaf_norm_makes_no_nan_of_its_own():
    with jax.debug_nans(True):
        clipped_by_leaf(0.5, [0, 0], [1e-30, 0], [3, 4])


@pytest.mark.parametrize(
    ('flag', 'options'),
    [
        ('--decay_steps', {'schedule': 'warmup_cosine', 'warmup_steps': 5, 'decay_steps': 5}),
        ('--decay_steps', {'schedule': 'warmup_cosine', 'warmup_steps': 6, 'decay_steps': 5}),
        *(
            ('--boundaries', {'schedule': 'piecewise', 'boundaries': text, 'warmup_steps': warmup})
            for text, warmup in itertools.chain(
                ((text, 0) for text in ('', 'x', '5,', ',5', '5;7', '0', '-3', '7,5', '5,5', '1.5')),
                [('3', 3), ('2,9', 3)],
            )
        ),
    ],
)
def test_bad_options(flag, options):
    with pytest.raises(UserError, match=f'^{flag}: .* found, .* expected'):
        build(config.Optimiser(**options))


class Before:
    """The chain as it was when the first runs were recorded, which must be replayable: not a line of it changes."""

    @staticmethod
    def adam(b1, b2, eps, epsilon_hat):
        def one_minus_power(b, t):
            return -jnp.expm1(t * math.log(b)) if b else jnp.ones_like(t, jnp.float32)

        def init(params):
            m, v = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
            return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=m, nu=v)

        def update(grads, state, params=None):
            t = optax.safe_increment(state.count)
            m = jax.tree.map(lambda m, g: m + (g - m) * (1 - b1), state.mu, grads)
            v = jax.tree.map(lambda v, g: v + (jnp.square(g) - v) * (1 - b2), state.nu, grads)
            root = jnp.sqrt(one_minus_power(b2, t))
            correction = root / one_minus_power(b1, t)
            epsilon = eps if epsilon_hat else eps * root
            updates = jax.tree.map(lambda m, v: m * correction / (jnp.sqrt(v) + epsilon), m, v)
            return updates, optax.ScaleByAdamState(count=t, mu=m, nu=v)

        return optax.GradientTransformation(init, update)

    @classmethod
    def build(cls, options, epsilon, epsilon_hat):
        return optax.with_extra_args_support(
            optax.chain(
                optax.identity(),
                cls.adam(options.b1, options.b2, epsilon, epsilon_hat),
                optax.scale_by_learning_rate(optax.constant_schedule(options.learning_rate)),
            )
        )


@pytest.mark.parametrize('preset', cells.PRESETS)
def test_the_default_optimiser_is_that_of_the_runs_of_before(preset):
    """State tree, jaxpr of the whole train step, and bits."""
    made = small.configuration(preset=preset)
    program = train.make_program(made, small.dataset())
    chosen = cells.PRESETS[preset]
    before = Before.build(made.optimiser, chosen.epsilon, chosen.epsilon_hat)
    rate = made.optimiser.learning_rate
    step = train.make_step(program.predict, before, lambda state: jnp.asarray(rate, jnp.float32))
    ours, theirs = program.init(), program.init()
    theirs = theirs._replace(opt_state=before.init(theirs.params))
    assert described(ours) == described(theirs)
    batch = program.batch_at(0)
    # In the addresses of functions alone may they differ.
    jaxprs = [re.sub('0x[0-9a-f]+', '', str(jax.make_jaxpr(f)(ours, batch))) for f in (program.step, step)]
    assert jaxprs[0] == jaxprs[1]
    compiled = [jax.jit(program.step), jax.jit(step)]
    for number in range(6):
        (ours, one), (theirs, other) = (
            f(state, program.batch_at(number)) for f, state in zip(compiled, (ours, theirs), strict=True)
        )
        assert one.keys() == other.keys()
        for a, b in zip(jax.tree.leaves((ours, one)), jax.tree.leaves((theirs, other)), strict=True):
            assert np.array_equal(a, b)


def test_a_configuration_of_before_is_read_and_keeps_its_digest():
    """As it was written before there were the options that are marked `later`."""
    written = config.Config().to_json()
    written['optimiser'] = {
        'learning_rate': 0.001, 'b1': 0.9, 'b2': 0.999, 'epsilon': 0.0, 'clip': 'none', 'clip_threshold': 1.0,
        'schedule': 'constant', 'warmup_steps': 0, 'decay_steps': 10000, 'decay_rate': 0.5,
        'end_learning_rate': 0.0, 'boundaries': '', 'plateau_patience': 10, 'plateau_window': 100,
    }  # fmt: skip
    read = config.Config.from_json(written)
    assert read == config.Config() and not read.differences(config.Config())
    assert read.digest() == 'c37d6bcec1a31e55'


@pytest.mark.parametrize('changes', EVERY_CHOICE[-11:], ids=str)
def test_a_later_option_that_is_chosen_alters_the_digest(changes):
    chosen = config.Config(optimiser=config.Optimiser(**changes))
    assert (chosen.digest() == config.Config().digest()) == (chosen.optimiser == config.Optimiser())
    assert config.Config.from_json(chosen.to_json()).digest() == chosen.digest()


def test_a_guarded_run_records_what_it_skipped():
    made = small.configuration()
    made = dataclasses.replace(made, optimiser=dataclasses.replace(made.optimiser, guard=True))
    program = train.make_program(made, small.dataset())
    step, state, told = jax.jit(program.step), program.init(), []
    for number in range(5):
        batch = program.batch_at(number)
        if number in (1, 2, 4):
            batch = batch._replace(targets=batch.targets * np.nan)
        before, (state, record) = state.params, step(state, batch)
        same = [
            np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
        ]
        assert all(same) if number in (1, 2, 4) else not any(same)
        told.append((int(record['skipped']), int(record['skipped_in_a_row'])))
    assert told == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


# From one configuration to another.


def after_steps(options: config.Optimiser, steps: int = 7):
    """A state that's far from a fresh one."""
    optimiser = build(options)
    update = jax.jit(lambda state, g, loss: optimiser.update(g, state, PARAMS, value=loss, **CURVED)[1])
    state = optimiser.init(PARAMS)
    for gradients, loss in zip(GRADIENTS[:steps], LOSSES, strict=False):
        state = update(state, gradients, loss)
    return state


def assert_same(found, expected) -> None:
    assert described(found) == described(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(a, b)


def links(options: config.Optimiser, state) -> tuple:
    state = state.inner if options.guard else state
    return state.inner if options.curvature_every else state


@pytest.mark.parametrize('chosen', EVERY_CHOICE, ids=str)
def test_converted_to_itself_it_is_itself(chosen):
    options = options_with(**chosen)
    state = after_steps(options, 2)
    assert_same(optimisers.convert(state, options, options, PARAMS), state)


OPTIONS = st.fixed_dictionaries(
    {
        **{name: st.sampled_from(CHOICES[name]) for name in ('clip', 'schedule', 'second_moment')},
        'update_clip': st.sampled_from([0.0, 1.0]),
        'spectral_cap': st.sampled_from([0.0, 0.05]),
        'moment_dtype': st.sampled_from(CHOICES['moment_dtype']),
        'bias_correction': st.booleans(),
        'guard': st.booleans(),
        'curvature_every': st.sampled_from([0, 2]),
    }
)


def assert_converts(before: config.Optimiser, after: config.Optimiser) -> None:
    """That the result has the type of what `after` starts with, whence it can be stepped."""
    old, new = (jax.eval_shape(build(options).init, PARAMS) for options in (before, after))
    found = jax.eval_shape(lambda state: optimisers.convert(state, before, after, PARAMS), old)
    assert described(found) == described(new)


@pytest.mark.parametrize('chosen', EVERY_CHOICE, ids=str)
def test_every_choice_converts_to_every_other(chosen):
    for other in EVERY_CHOICE:
        assert_converts(options_with(**chosen), options_with(**other))


@given(OPTIONS, OPTIONS)
@settings(max_examples=60, deadline=None)
def test_every_configuration_converts_to_every_other(before, after):
    assert_converts(options_with(**before), options_with(**after))


@pytest.mark.parametrize('after', EVERY_CHOICE, ids=str)
def test_moments_and_counts_are_carried(after):
    before = options_with(clip='zclip', second_moment='amsgrad', spectral_cap=0.1)
    state = after_steps(before)
    found = links(options_with(**after), optimisers.convert(state, before, options_with(**after), PARAMS))
    assert found[1].count == found[2].count == 7
    kept = after.get('moment_dtype', 'float32')
    assert_same(
        (found[1].mu, found[1].nu), jax.tree.map(lambda x: x.astype(kept), (state[1].mu, state[1].nu))
    )
    if after.get('clip') == 'zclip':
        assert_same(found[0], state[0])
    else:
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(found[0]))


def test_the_largest_v_starts_at_the_v_there_is():
    adam, amsgrad = options_with(), options_with(second_moment='amsgrad')
    state = after_steps(adam)
    found = optimisers.convert(state, adam, amsgrad, PARAMS)
    assert_same(found[1].nu_max, state[1].nu)
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(found)
    assert_same(optimisers.convert(after_steps(amsgrad), amsgrad, adam, PARAMS), after_steps(adam))


def test_a_converted_state_steps_as_the_formula():
    """Adam for seven steps, then AMSGrad: the largest of v from there on."""
    before, after = options_with(warmup_steps=0), options_with(warmup_steps=0, second_moment='amsgrad')
    state = optimisers.convert(after_steps(before), before, after, PARAMS)
    g = [np.float64(gradients['bias']) for gradients in GRADIENTS]
    m = v = 0 * g[0]
    for t, x in enumerate(g, 1):
        m, v = 0.9 * m + 0.1 * x, 0.999 * v + 0.001 * x**2
        if t >= 7:
            largest = v if t == 7 else np.maximum(largest, v)  # noqa: F821
        if t > 7:
            updates, state = build(after).update(GRADIENTS[t - 1], state, PARAMS, value=1.0)
            expected = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(largest) + 1e-7)
            assert_close(updates['bias'], -1e-3 * expected, 'float32 adam')


def test_a_plateau_goes_on():
    """Scale and best are kept; what is counted to another end is counted anew, as it may be beyond it."""
    before = options_with(schedule='plateau', plateau_window=5, plateau_patience=9)
    state = after_steps(before)
    state = (*state[:3], state[3]._replace(scale=jnp.float32(0.25), plateau_count=jnp.int32(4)))
    assert state[3].count == 2
    for changes, count, bad in (
        ({}, 2, 4),
        ({'plateau_window': 2}, 0, 4),
        ({'plateau_patience': 3}, 2, 0),
        ({'learning_rate': 0.1, 'guard': True}, 2, 4),
    ):
        after = dataclasses.replace(before, **changes)
        found = links(after, optimisers.convert(state, before, after, PARAMS))[3]
        assert (found.scale, found.count, found.plateau_count) == (0.25, count, bad)
        assert found.best_value == state[3].best_value
    constant = options_with()
    assert (
        optimisers.convert(optimisers.convert(state, before, constant, PARAMS), constant, before, PARAMS)[
            3
        ].scale
        == 1
    )


def test_leaving_a_guard_the_schedule_catches_up():
    guarded, free = options_with(schedule='exponential', guard=True), options_with(schedule='exponential')
    optimiser, state = build(guarded), after_steps(guarded, 4)
    for _ in range(3):
        _, state = optimiser.update(GRADIENTS[0], state, PARAMS, value=jnp.float32(jnp.nan))
    found = optimisers.convert(state, guarded, free, PARAMS)
    assert (found[1].count, found[2].count) == (4, 7)
    updates, _ = build(free).update(GRADIENTS[5], found, PARAMS, value=1.0)
    reference, _ = build(options_with()).update(GRADIENTS[5], found, PARAMS, value=1.0)
    told = optimisers.current_learning_rate(free, jnp.int32(7), found)
    assert_close(updates['bias'] / reference['bias'] * 1e-3, np.full(4, told), 'float32 schedule')
    back = optimisers.convert(found, free, guarded, PARAMS)
    assert (back.skipped, back.in_a_row, back.inner[2].count) == (0, 0, 7)
    assert_same(optimisers.convert(state, guarded, dataclasses.replace(guarded, b1=0.5), PARAMS), state)


@pytest.mark.parametrize('schedule', CHOICES['schedule'])
def test_a_state_is_finite_from_the_start(schedule):
    """Else its run would be told to have diverged at its first step."""
    made = config.Optimiser(schedule=schedule, boundaries='5')
    state = optimisers.build(made, epsilon=1e-8, epsilon_hat=False).init(PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
