"""Each transform against its paper's formula in float64, known values, and one battery that all of them pass."""

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from jaxrnn import tree
from jaxrnn.optim import transforms

SHAPES = {'bias': (4,), 'kernel': (3, 4)}
EPSILON = 1e-8


def draw(seed: int, scale: float = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS = draw(0)


def spiky(steps: int, scale: float = 1) -> list[dict[str, np.ndarray]]:
    """Gradients of about one scale, each ninth of them ten times as large."""
    return [draw(1 + t, scale * (10 if t % 9 == 8 else 1)) for t in range(steps)]


def in_float64(gradients: list[dict]) -> list[dict]:
    return [{name: np.float64(leaf) for name, leaf in g.items()} for g in gradients]


def adam(**options) -> optax.GradientTransformation:
    return transforms.scale_by_adam(0.9, 0.999, EPSILON, epsilon_hat=False, **options)


def scanned(transform, gradients, params=PARAMS, value=1.0):
    """All updates, and the last state, which a scan carries."""
    transform = optax.with_extra_args_support(transform)

    def step(state, g):
        updates, state = transform.update(g, state, params, value=value)
        return state, updates

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)
    return jax.jit(lambda state: jax.lax.scan(step, state, stacked))(transform.init(params))[::-1]


def assert_follows(transform, gradients, expected: list[dict], kind: str = 'float32 adam') -> None:
    updates, _ = scanned(transform, gradients)
    for name in SHAPES:
        for found, step in zip(updates[name], expected, strict=True):
            assert_close(found, step[name], kind)


def by_leaf(formula, gradients: list[dict], **options) -> list[dict]:
    """The steps of `formulas.adam`, whose loop is over one leaf."""
    made = {name: formula([g[name] for g in in_float64(gradients)], **options) for name in SHAPES}
    return [{name: made[name][t] for name in SHAPES} for t in range(len(gradients))]


TRANSFORMS = {
    'adam': adam(),
    'amsgrad': adam(second_moment='amsgrad'),
    'yogi': adam(second_moment='yogi'),
    'adam in bfloat16': adam(dtype='bfloat16'),
    'amsgrad in bfloat16': adam(dtype='bfloat16', second_moment='amsgrad'),
    'clip_by_leaf_norm': transforms.clip_by_leaf_norm(1.0),
    'clip_update_rms': transforms.clip_update_rms(adam(), 0.999, EPSILON, 1.0),
    'clip_spikes': transforms.clip_spikes(adam(), 4.0),
    'zclip': transforms.zclip(2.5),
    'adagc': transforms.adagc(1.05, 1.0),
    'spectral_cap': transforms.spectral_cap(0.05),
    'guard': transforms.guard(optax.with_extra_args_support(adam())),
    'all of it': transforms.guard(
        optax.with_extra_args_support(
            optax.chain(
                transforms.zclip(2.5),
                transforms.adagc(1.05, 1.0),
                transforms.clip_spikes(
                    transforms.clip_update_rms(adam(second_moment='amsgrad'), 0.999, EPSILON, 1.0), 4.0
                ),
                transforms.spectral_cap(0.05),
            )
        )
    ),
}

every = pytest.mark.parametrize('name', TRANSFORMS)


class TestEvery:
    """The battery."""

    @pytest.fixture
    def transform(self, name):
        return optax.with_extra_args_support(TRANSFORMS[name])

    @every
    def test_state_and_updates_keep_structure_and_types(self, transform):
        state = transform.init(PARAMS)
        for gradients in spiky(3):
            updates, after = jax.jit(transform.update)(gradients, state, PARAMS, value=1.0)
            assert described(after) == described(state)
            assert described(updates) == described(jax.tree.map(jnp.asarray, gradients))
            state = after
        assert described(jax.jit(lambda state: state)(state)) == described(state)

    @every
    def test_buffers_can_all_be_donated(self, transform):
        jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(
            transform.init(PARAMS)
        )

    @every
    def test_vmap_is_a_loop(self, transform):
        gradients = spiky(3)
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
        states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), transform.init(PARAMS))
        found, _ = jax.vmap(lambda g, state: transform.update(g, state, PARAMS, value=1.0))(together, states)
        for t, g in enumerate(gradients):
            updates, _ = transform.update(g, transform.init(PARAMS), PARAMS, value=1.0)
            for name in SHAPES:
                assert_close(found[name][t], updates[name], 'float32 function')

    @every
    def test_zero_gradients_make_zero_updates(self, transform):
        """For ever, without a NaN on the way, and without harm to what comes after."""
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        with jax.debug_nans(True):
            updates, _ = scanned(transform, [zeros] * 120 + [PARAMS])
        for name in SHAPES:
            assert not np.any(updates[name][:-1])
            assert np.all(updates[name][-1] != 0)

    @every
    def test_nothing_to_train(self, transform):
        for params in ({}, {'none': jnp.zeros((0, 4))}, {'none': jnp.zeros(0), 'one': jnp.ones(())}):
            state = transform.init(params)
            with jax.debug_nans(True):
                updates, after = transform.update(params, state, params, value=1.0)
            assert described(updates) == described(params)
            assert described(after) == described(state)

    @every
    @pytest.mark.parametrize('bad', [np.nan, -np.inf])
    def test_one_bad_number_stays_where_it_is(self, transform, name, bad):
        """Of the updates: a whole leaf for clip_by_leaf_norm, one number for the rest, and none under a guard."""
        gradients = spiky(4)
        gradients[2]['kernel'][1, 2] = bad
        updates, state = scanned(transform, gradients)
        assert np.all(np.isfinite(updates['bias']))
        assert np.all(np.isfinite(updates['kernel'][:2]))
        spoilt = ~np.isfinite(updates['kernel'][2])
        if isinstance(state, transforms.GuardState):
            assert np.all(np.isfinite(updates['kernel']))
            assert (state.skipped, state.in_a_row) == (1, 0)
        elif name == 'clip_by_leaf_norm':
            assert spoilt[1, 2]
        else:
            assert spoilt[1, 2] and spoilt.sum() == 1
            for statistic in (transforms.ZClipState, transforms.AdaGCState, transforms.SpectralCapState):
                assert not isinstance(state, statistic) or tree.all_finite(state)


def described(tree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, getattr(leaf, 'weak_type', False)) for leaf in leaves]


class TestSecondMoments:
    @pytest.mark.parametrize('hat', [False, True])
    @pytest.mark.parametrize('rule', ['adam', 'amsgrad', 'yogi'])
    def test_formula(self, rule, hat):
        gradients = spiky(40)
        transform = transforms.scale_by_adam(0.9, 0.9, 1e-3, epsilon_hat=hat, second_moment=rule)
        expected = by_leaf(
            formulas.adam, gradients, b1=0.9, b2=0.9, epsilon=1e-3, hat=hat, second_moment=rule
        )
        assert_follows(transform, gradients, expected)

    def test_amsgrad_is_optaxs_but_for_the_correction(self):
        """With bias_correction_nu=False optax leaves out 1 - b2^t, the epsilon's share of which is ours to add."""
        ours, found = adam(second_moment='amsgrad'), []
        state, other = ours.init(PARAMS), optax.scale_by_amsgrad().init(PARAMS)
        for t, gradients in enumerate(spiky(20), 1):
            root = np.sqrt(1 - 0.999**t)
            found, state = ours.update(gradients, state)
            theirs = optax.scale_by_amsgrad(eps=EPSILON * root, bias_correction_nu=False)
            expected, other = theirs.update(gradients, other)
            for name in SHAPES:
                assert_close(found[name], root * np.float64(expected[name]), 'float32 adam')

    def test_yogi_is_optaxs_from_zero(self):
        with jax.enable_x64(True):
            theirs, _ = scanned(
                optax.scale_by_yogi(0.9, 0.999, EPSILON, initial_accumulator_value=0.0),
                in_float64(spiky(20)),
                jax.tree.map(np.float64, PARAMS),
            )
        assert theirs['bias'].dtype == np.float64
        assert_follows(
            adam(second_moment='yogi'), spiky(20), [{n: theirs[n][t] for n in SHAPES} for t in range(20)]
        )

    def test_after_a_spike_by_hand(self):
        """Gradients 10, 1, 1, b2 = 1/2: v 50, 25.5, 13.25; the largest 50; Yogi's 50, 49.5, 49."""
        expected = {'adam': 13.25, 'amsgrad': 50, 'yogi': 49}
        for rule, v in expected.items():
            transform = transforms.scale_by_adam(0.0, 0.5, 1e-30, epsilon_hat=True, second_moment=rule)
            updates, _ = scanned(transform, [np.float32([g]) for g in (10, 1, 1)], np.float32([0]))
            assert_close(updates[-1], [np.sqrt((1 - 0.5**3) / v)], 'float32 adam')


class TestUpdateRMS:
    @pytest.mark.parametrize('d', [0.5, 1.0, 2.0])
    def test_formula(self, d):
        gradients = spiky(40)
        options = {'b1': 0.9, 'b2': 0.9, 'epsilon': 0.1, 'hat': False}
        expected = by_leaf(formulas.adam, gradients, d=d, **options)
        plain = by_leaf(formulas.adam, gradients, **options)
        shortened = [not np.array_equal(a['bias'], b['bias']) for a, b in zip(expected, plain, strict=True)]
        assert any(shortened) and not all(shortened)
        inner = transforms.scale_by_adam(0.9, 0.9, 0.1, epsilon_hat=False)
        assert_follows(transforms.clip_update_rms(inner, 0.9, 0.1, d), gradients, expected)

    @pytest.mark.parametrize(('b2', 'largest'), [(0.999, 31.6), (0.99, 10.0), (0.95, 4.47)])
    def test_largest_rms(self, b2, largest):
        """A spike out of nothing after v has forgotten its correction: 1 / sqrt(1 - b2)."""
        inner = transforms.scale_by_adam(0.0, b2, 1e-30, epsilon_hat=False)
        gradients = [np.float32([1e-12])] * 20_000 + [np.float32([1])]
        plain, _ = scanned(inner, gradients, np.float32([0]))
        found, _ = scanned(transforms.clip_update_rms(inner, b2, 1e-30, 1.0), gradients, np.float32([0]))
        rms = plain[-1] / found[-1]
        assert rms == pytest.approx(largest, rel=2e-3)
        assert_close(rms, [1 / np.sqrt(1 - b2)], 'float32 adam')
        assert_close(found[-1], [1], 'float32 adam')


class TestSpikes:
    def test_formula(self):
        """The tenth gradients are spikes of ten: clipped to sqrt(8 v) from the 21st step on."""
        gradients = spiky(50)
        options = {'b1': 0.9, 'b2': 0.9, 'epsilon': 0.1, 'hat': False}
        expected = by_leaf(formulas.adam, gradients, theta=8.0, **options)
        plain = by_leaf(formulas.adam, gradients, **options)
        clipped = [not np.array_equal(a['kernel'], b['kernel']) for a, b in zip(expected, plain, strict=True)]
        assert not any(clipped[:20]) and any(clipped)
        inner = transforms.scale_by_adam(0.9, 0.9, 0.1, epsilon_hat=False)
        assert_follows(transforms.clip_spikes(inner, 8.0), gradients, expected)

    def test_a_number_without_a_past_is_left_alone(self):
        gradients = [np.float32([1, 0])] * 30 + [np.float32([1e6, 1])] * 2
        _, state = scanned(transforms.clip_spikes(adam(), 5000.0), gradients, np.float32([0, 0]))
        v = (1 - 0.999**30) * 0.999 + 0.001 * 5000 * (1 - 0.999**30)
        assert_close(state.nu[0], v * 0.999 + 0.001 * 5000 * v, 'float32 adam')
        assert state.nu[1] > 0

    def test_moments_set_to_zero_are_a_kick(self):
        """m / sqrt(v) for a constant gradient, if the count of the bias correction goes on, and if it starts anew:
        why `optim.convert` never zeroes moments."""
        transform = transforms.scale_by_adam(0.9, 0.999, 1e-30, epsilon_hat=False)
        fresh = transform.init(jnp.zeros(1))
        for count, expected in ((100_000, {1: 3.16, 2: 4.25, 12: 6.57}), (0, {1: 1.0, 2: 1.0, 12: 1.0})):
            state, ratios = fresh._replace(count=jnp.int32(count)), []
            for _ in range(40):
                update, state = transform.update(jnp.ones(1), state)
                ratios.append(float(update[0]))
            assert max(ratios) == pytest.approx(max(expected.values()), rel=1e-3)
            for k, ratio in expected.items():
                assert ratios[k - 1] == pytest.approx(ratio, rel=1e-3)
            assert count == 0 or np.argmax(ratios) == 11


class TestZClip:
    def test_formula(self):
        gradients = spiky(80)
        expected = formulas.zclip(in_float64(gradients), 1.5)
        clipped = [a['bias'][0] != b['bias'][0] for a, b in zip(expected, gradients, strict=True)]
        assert not any(clipped[:25])
        assert 3 < sum(clipped) < 20
        assert_follows(transforms.zclip(1.5), gradients, expected)

    def test_by_hand(self):
        """Norms 1 and 3 in turn, of mean 1.96 and deviation sqrt(.9984) over 25; then 10, which is z = 8.05."""
        gradients = [np.float32([1 + 2 * (t % 2)]) for t in range(25)] + [np.float32([10])]
        updates, state = scanned(transforms.zclip(2.5), gradients, np.float32([0]))
        clipped = 1.96 + 2.5**2 * 0.9984 / 8.04
        mean = 0.97 * 1.96 + 0.03 * clipped
        assert_close(updates[-1], [clipped], 'float32 adam')
        assert_close(state.mean, mean, 'float32 adam')
        assert_close(state.variance, 0.97 * 0.9984 + 0.03 * (clipped - mean) ** 2, 'float32 adam')
        assert state.seen == 26

    @given(st.integers(-40, 40))
    @settings(max_examples=8, deadline=None)
    def test_is_the_same_for_every_scale(self, exponent):
        """Bit for bit, for gradients 2^exponent times as large."""
        updates, _ = scanned(transforms.zclip(1.5), spiky(60))
        scaled, _ = scanned(transforms.zclip(1.5), spiky(60, 2.0**exponent))
        for name in SHAPES:
            assert np.array_equal(np.ldexp(updates[name], exponent), scaled[name])

    @pytest.mark.parametrize('steps', [3, 40])
    def test_a_nan_enters_no_statistic(self, steps):
        gradients = spiky(steps)
        _, expected = scanned(transforms.zclip(1.5), gradients)
        poisoned = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), gradients[0])
        _, found = scanned(transforms.zclip(1.5), [*gradients, poisoned, poisoned])
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


class TestAdaGC:
    def test_formula(self):
        gradients = spiky(140)
        expected = formulas.adagc(in_float64(gradients), 4.0, 3.0)
        clipped = [a['bias'][0] != b['bias'][0] for a, b in zip(expected, gradients, strict=True)]
        assert 0 < sum(clipped[:100]) < 100
        assert 0 < sum(clipped[100:]) < 40
        assert_follows(transforms.adagc(4.0, 3.0), gradients, expected)

    def test_by_hand(self):
        """A norm of 2 for 100 steps, smallest 1: gamma is 1, and the next 2 is clipped to 1.05."""
        gradients = [np.float32([1 if t == 7 else 2]) for t in range(101)]
        updates, state = scanned(transforms.adagc(1.05, 5.0), gradients, np.float32([0]))
        assert_close(updates[-1], [1.05], 'float32 function')
        assert_close(state.norms, 0.98 + 0.02 * 1.05, 'float32 function')

    @pytest.mark.parametrize('late', [0, 110])
    def test_a_leaf_that_wakes_up_is_not_held_at_zero(self, late):
        quiet, loud = {'a': np.zeros(2, np.float32)}, {'a': np.float32([3, 4])}
        updates, state = scanned(transforms.adagc(1.05, 10.0), [quiet] * late + [loud], {'a': np.zeros(2)})
        assert_close(updates['a'][-1], [3, 4], 'exact')
        assert state.norms['a'] == 5

    def test_a_norm_of_zero_says_nothing(self):
        """Neither in the first 100 steps nor after them does gamma, here 1, follow it."""
        gradients = [np.float32([g]) for g in [1, 0, 1] * 34 + [0] * 50 + [2]]
        updates, _ = scanned(transforms.adagc(1.05, 5.0), gradients, np.float32([0]))
        assert_close(updates[-1], [1.05], 'float32 adam')

    @pytest.mark.parametrize('bad', [np.nan, np.inf])
    def test_a_bad_leaf_leaves_the_others_and_its_own_past_alone(self, bad):
        gradients = [{'a': np.float32([1, 0]), 'b': np.float32([1])}] * 101
        gradients.append({'a': np.float32([bad, 3]), 'b': np.float32([4])})
        updates, state = scanned(transforms.adagc(1.05, 10.0), gradients, gradients[0])
        assert np.array_equal(updates['a'][-1], np.float32([bad, 3]), equal_nan=True)
        assert_close(updates['b'][-1], [1.05], 'float32 function')
        assert_close(state.norms['a'], 1, 'float32 function')
        assert_close(state.norms['b'], 0.98 + 0.02 * 1.05, 'float32 function')


class TestSpectralCap:
    def test_matrices_are_capped_and_the_rest_is_not(self):
        """A step that turns slowly, as Adam's does."""
        rng = np.random.default_rng(0)
        params = {'w': rng.normal(size=(20, 30)).astype(np.float32), 'b': np.ones(30, np.float32)}
        steps, step = [], rng.normal(size=(20, 30))
        for _ in range(30):
            step = 0.9 * step + 0.1 * rng.normal(size=(20, 30))
            steps.append({'w': np.float32(step), 'b': np.float32(rng.normal(size=30))})
        updates, _ = scanned(transforms.spectral_cap(0.05), steps, params)
        cap = 0.05 * np.linalg.norm(params['w'], 2)
        sizes = np.linalg.norm(updates['w'], 2, axis=(1, 2)) / cap
        assert np.median(sizes) < 1.02
        for t, (found, asked) in enumerate(zip(updates['w'], steps, strict=True)):
            size = np.linalg.norm(found, 2)
            assert 0.999 * cap < size < 1.25 * cap
            assert_close(found / size, asked['w'] / np.linalg.norm(asked['w'], 2), 'float32 adam')
            assert_close(updates['b'][t], asked['b'], 'exact')

    def test_a_small_step_passes(self):
        params = {'w': np.eye(4, dtype=np.float32)}
        updates, _ = scanned(transforms.spectral_cap(0.05), [{'w': 0.04 * params['w']}], params)
        assert_close(updates['w'][0], np.float32(0.04) * np.eye(4), 'exact')

    def test_converges_to_the_norm(self):
        rng = np.random.default_rng(1)
        params = {'w': rng.normal(size=(6, 5)).astype(np.float32)}
        updates, _ = scanned(transforms.spectral_cap(0.05), [params] * 50, params)
        assert_close(updates['w'][-1], 0.05 * np.float64(params['w']), 'float32 function')

    def test_zeros_can_leave_zero(self):
        params = {'w': np.zeros((3, 3), np.float32)}
        updates, _ = scanned(transforms.spectral_cap(0.05), [{'w': np.eye(3, dtype=np.float32)}], params)
        assert_close(np.linalg.norm(updates['w'][0], 2), 0.05e-3, 'float32 function')

    @pytest.mark.parametrize('scale', [1e-36, 1e-25, 1.0, 1e25, 1e36])
    def test_no_square_overflows(self, scale):
        params = {'w': np.float32(scale) * np.eye(4, dtype=np.float32)}
        with jax.debug_nans(True):
            updates, state = scanned(transforms.spectral_cap(0.05), [params] * 3, params)
        factor = min(0.05 * max(scale, 1e-3) / scale, 1)
        assert_close(updates['w'][-1], factor * np.float64(params['w']), 'float32 function')
        assert tree.all_finite(state)


def fill(value):
    return lambda g: {**g, 'kernel': jnp.full_like(g['kernel'], value)}


BAD_STEPS = {
    'loss is NaN': (lambda g: g, np.nan),
    'loss is infinite': (lambda g: g, np.inf),
    'gradient is NaN': (fill(np.nan), 1.0),
    'gradient is infinite': (fill(-np.inf), 1.0),
    'square of the gradient overflows': (fill(1e30), 1.0),
}


class TestGuard:
    @pytest.fixture
    def guarded(self):
        return transforms.guard(
            optax.chain(transforms.zclip(2.5), adam(), optax.scale_by_learning_rate(1e-2))
        )

    @pytest.mark.parametrize('bad', BAD_STEPS)
    def test_a_bad_step_changes_no_bit_and_the_next_is_as_if_it_had_never_been(self, guarded, bad):
        spoil, loss = BAD_STEPS[bad]
        params = {**PARAMS, 'bias': np.float32([0.0, -0.0, 1, 2])}
        update = jax.jit(guarded.update)
        _, state = update(draw(1), guarded.init(params), params, value=1.0)
        updates, after = update(spoil(draw(2)), state, params, value=loss)
        assert_same_bits(optax.apply_updates(params, updates), params)
        assert_same_bits(after.inner, state.inner)
        assert (after.skipped, after.in_a_row) == (1, 1)
        assert_same_bits(
            update(draw(3), after, params, value=1.0)[0], update(draw(3), state, params, value=1.0)[0]
        )
        assert update(draw(3), after, params, value=1.0)[1][1:] == (1, 0)

    def test_an_update_that_is_not_finite(self):
        spoilt = optax.stateless(lambda u, params: jax.tree.map(lambda x: jnp.divide(x, 0.0), u))
        guarded = transforms.guard(optax.with_extra_args_support(spoilt))
        updates, state = guarded.update(draw(1), guarded.init(PARAMS), PARAMS, value=1.0)
        assert not any(np.any(leaf) for leaf in updates.values())
        assert state.skipped == 1

    def test_it_never_gives_in(self, guarded):
        """optax.apply_if_finite would, after its limit."""
        poisoned = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), PARAMS)
        updates, state = scanned(guarded, [poisoned] * 300)
        assert not any(np.any(leaf) for leaf in updates.values())
        assert (state.skipped, state.in_a_row) == (300, 300)

    def test_the_count_in_a_row_starts_anew(self, guarded):
        state, counts = guarded.init(PARAMS), []
        for loss in (np.nan, np.nan, 1.0, np.nan, 1.0):
            _, state = guarded.update(draw(1), state, PARAMS, value=np.float32(loss))
            counts.append((int(state.skipped), int(state.in_a_row)))
        assert counts == [(1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]

    def test_a_healthy_step_is_the_step_of_what_it_guards(self, guarded):
        inner = optax.chain(transforms.zclip(2.5), adam(), optax.scale_by_learning_rate(1e-2))
        found, state = scanned(guarded, spiky(40))
        expected, plain = scanned(inner, spiky(40))
        assert state.skipped == 0
        for a, b in zip(*map(jax.tree.leaves, ((found, state.inner), (expected, plain))), strict=True):
            assert_close(a, b, 'float32 adam')  # XLA may fuse, and so round, it otherwise

    def test_what_began_as_infinity_may_stay_it(self):
        """As the plateau schedule's smallest loss does until its first window is over."""
        plateau = optax.contrib.reduce_on_plateau(accumulation_size=5)
        guarded = transforms.guard(plateau)
        _, state = guarded.update(draw(1), guarded.init(PARAMS), PARAMS, value=1.0)
        assert state.skipped == 0


def assert_same_bits(found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
