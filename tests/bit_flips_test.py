"""A bit of the state that flipped while a run trained: it is named, or nothing is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import tree
from jaxrnn.record import bit_flips, loop, telemetry

STEPS, EVERY = 40, 10


def state_of(seed: int):
    """A state with a leaf of each type that a digest is made of."""
    draw = np.random.default_rng(seed)
    return {
        'bfloat16': jnp.asarray(draw.standard_normal(5), jnp.bfloat16),
        'bool': jnp.array([True, False, True]),
        'complex64': jnp.asarray(draw.standard_normal((2, 2)) + 1j, jnp.complex64),
        'empty': jnp.zeros((0, 3)),
        'float16': jnp.asarray(draw.standard_normal(3), jnp.float16),
        'float32': jnp.asarray(draw.standard_normal((3, 4)), jnp.float32),
        'int8': jnp.arange(-3, 4, dtype=jnp.int8),
        'key': jax.random.key(seed),
        'scalar': jnp.int32(seed),
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.data())
def test_the_bit_by_which_a_state_differs_from_a_digest(seed, data):
    state = state_of(seed)
    path = data.draw(st.sampled_from([path for path in state if path != 'empty']))
    words = tree.words_of(state[path])
    word = data.draw(st.integers(0, words.size - 1))
    bits = {'bool': 1, 'int8': 8, 'bfloat16': 16, 'float16': 16}.get(path, 32)
    bit = data.draw(st.integers(0, bits - 1))
    mask = jnp.zeros(words.shape, jnp.uint32).at[word].set(1 << bit)
    other = {**state, path: bit_flips.with_flipped(state[path], mask)}
    digest = loop.state_digest(other)
    assert digest != loop.state_digest(state)
    found = bit_flips.of_state(state, digest)
    assert found is not None and (found.path, found.bit) == (path, bit)
    numbers = jax.random.key_data(state['key']) if path == 'key' else state[path]
    flat = np.ravel_multi_index(found.place, numbers.shape) if numbers.shape else 0
    assert flat == word % max(numbers.size, 1)
    assert bit_flips.of_state(state, loop.state_digest(state_of(seed + 1))) is None
    assert bit_flips.of_state(state, loop.state_digest(state)) is None


def test_numbers_of_64_bits():
    with jax.enable_x64(True):
        state = {'a': jnp.arange(6, dtype=jnp.float64).reshape(2, 3), 'b': jnp.ones(2, jnp.complex128)}
        for path, word, place, bit in (('a', 9, (1, 1), 32 + 7), ('a', 4, (0, 2), 7), ('b', 5, (0,), 32 + 7)):
            mask = jnp.zeros(tree.words_of(state[path]).shape, jnp.uint32).at[word].set(1 << 7)
            other = {**state, path: bit_flips.with_flipped(state[path], mask)}
            found = bit_flips.of_state(state, loop.state_digest(other))
            assert found is not None and (found.path, found.place, found.bit) == (path, place, bit)
            assert found.wrong != found.right


optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def step(state, batch):
    params, moments = state

    def loss_of(params):
        return jnp.mean((jnp.tanh(batch[0] @ params['in']) @ params['out'] - batch[1]) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, moments = optimiser.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), {'loss': loss}


def init():
    draw = np.random.default_rng(0)
    params = {
        'in': jnp.asarray(draw.standard_normal((6, 8)) / 3, jnp.float32),
        'out': jnp.asarray(draw.standard_normal((8, 2)) / 3, jnp.float32),
    }
    return params, optimiser.init(params)


def batch_at(number):
    draw = np.random.default_rng((1, number))
    x = draw.standard_normal((16, 6)).astype(np.float32)
    return x, np.tanh(x[:, :2])


class Struck:
    """A compiled step of which one call finds, or leaves, another state than it should."""

    def __init__(self, compiled, strike, at, before):
        self.compiled, self.strike, self.at, self.before, self.calls = compiled, strike, at, before, 0

    def __call__(self, state, batch, digest):
        struck, self.calls = self.calls == self.at, self.calls + 1
        if struck and self.before:
            return self.compiled(self.strike(state), batch, digest)
        after, observation = self.compiled(state, batch, digest)
        if struck:
            after = self.strike(after)
            record = {**observation.record, 'digest': tree.digest(after)}
            observation = observation._replace(record=record)
        return after, observation

    def __getattr__(self, name):
        return getattr(self.compiled, name)


def struck_run(directory, monkeypatch, strike, *, at, before=True, stop=STEPS, every=EVERY):
    """A run in which a bit flips; its own training had no idea."""
    compiled = telemetry.instrument(step)
    with monkeypatch.context() as patched:
        patched.setattr(telemetry, 'instrument', lambda *a, **k: Struck(compiled, strike, at, before))
        jaxrnn.record(step, batch_at, init, directory, max_steps=stop, checkpoint_every=every)


def flipped(path, word, bit):
    def strike(state):
        leaves, structure = jax.tree.flatten(state)
        place = list(tree.named_leaves(state)).index(path)
        mask = jnp.zeros(tree.words_of(leaves[place]).shape, jnp.uint32).at[word].set(1 << bit)
        leaves[place] = bit_flips.with_flipped(leaves[place], mask)
        return jax.tree.unflatten(structure, leaves)

    return strike


PATHS = list(tree.named_leaves(init()))
MOMENTS = [path for path in PATHS if path.split('/')[0] == '1' and 'count' not in path]


def said(directory) -> str:
    found, _ = jaxrnn.bisect(step, batch_at, directory, like=init(), verify=True)
    assert found.replay.first_mismatch is not None
    assert found.cause.kind == 'hardware', found.cause
    return found.cause.why


@pytest.mark.parametrize('seed', range(4))
def test_after_a_step(seed, tmp_path, monkeypatch):
    draw = np.random.default_rng((7, seed))
    path, bit, at = draw.choice(PATHS), int(draw.integers(0, 32)), int(draw.integers(0, STEPS))
    words = tree.words_of(tree.named_leaves(init())[path])
    word = int(draw.integers(0, words.size))
    struck_run(tmp_path, monkeypatch, flipped(path, word, bit), at=at, before=False)
    why = said(tmp_path)
    assert f'from step {at} on' in why and f'bit {bit} of {path}' in why and 'state after it' in why


@pytest.mark.parametrize('seed', range(4))
def test_of_a_moment_before_a_step(seed, tmp_path, monkeypatch):
    draw = np.random.default_rng((8, seed))
    path, bit, at = draw.choice(MOMENTS), int(draw.integers(18, 31)), int(draw.integers(1, STEPS))
    shape = tree.named_leaves(init())[path].shape
    word = int(draw.integers(0, np.prod(shape)))
    struck_run(tmp_path, monkeypatch, flipped(path, word, bit), at=at)
    why = said(tmp_path)
    place = ', '.join(str(int(n)) for n in np.unravel_index(word, shape))
    assert f'from step {at} on' in why and f'bit {bit} of {path}[{place}]' in why and 'starts from' in why


def test_of_a_count_before_a_step(tmp_path, monkeypatch):
    (path,) = [path for path in PATHS if 'count' in path]
    struck_run(tmp_path, monkeypatch, flipped(path, 0, 4), at=17)
    assert f'bit 4 of {path} ' in said(tmp_path)


@pytest.mark.parametrize('seed', range(4))
def test_of_a_weight_before_a_step(seed, tmp_path, monkeypatch):
    """The next checkpoint shows which."""
    draw = np.random.default_rng((9, seed))
    path, bit = draw.choice(['0/in', '0/out']), int(draw.integers(21, 29))
    at = int(draw.integers(1, STEPS - 3))
    shape = tree.named_leaves(init())[path].shape
    word = int(draw.integers(0, np.prod(shape)))
    struck_run(tmp_path, monkeypatch, flipped(path, word, bit), at=at)
    place = ', '.join(str(int(n)) for n in np.unravel_index(word, shape))
    assert f'bit {bit} of {path}[{place}]' in said(tmp_path)


def test_inside_of_a_step_nothing_is_named(tmp_path, monkeypatch):
    """As of an activation: no bit of a state makes that run."""

    def strike(state):
        return jax.tree.map(lambda leaf: leaf * (1 + 1e-5) if leaf.dtype == jnp.float32 else leaf, state)

    struck_run(tmp_path, monkeypatch, strike, at=23)
    why = said(tmp_path)
    assert 'from step 23 on' in why and 'bit ' not in why.replace('bit for bit', '')
