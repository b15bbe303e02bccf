"""Named leaves, norms, finite flags, and the digest that a replay's proof rests on."""

import collections
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from jaxrnn import tree

Pair = collections.namedtuple('Pair', 'first second')


def test_named_leaves():
    made = {'params': {'lstm': {'kernel': 1, 'bias': 2}}, 'state': Pair(3, [4, (5,)]), 'none': None}
    assert tree.named_leaves(made) == {
        'params/lstm/bias': 2,
        'params/lstm/kernel': 1,
        'state/first': 3,
        'state/second/0': 4,
        'state/second/1/0': 5,
    }
    assert tree.named_leaves({}) == {}
    assert list(tree.named_leaves({'b': 1, 'a': 2})) == ['a', 'b']  # in the order of jax.tree.leaves


def test_norm():
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=shape).astype(np.float32) for shape in ((50, 40), (300,), (), (0, 3))]
    expected = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
    assert_close(tree.norm([jnp.asarray(leaf) for leaf in leaves]), expected, 'float32 forward')
    assert_close(tree.norm({'a': jnp.array([3.0]), 'b': (jnp.array(-4),)}), 5, 'exact')


def test_norm_at_the_ends():
    assert tree.norm({}) == 0
    assert tree.norm([jnp.zeros(3)]) == 0
    assert tree.norm([jnp.array([1e19])]) < jnp.inf
    assert tree.norm([jnp.array([1e20])]) == jnp.inf
    assert tree.norm([jnp.array([1.0]), jnp.array([-jnp.inf])]) == jnp.inf
    assert jnp.isnan(tree.norm([jnp.array([1.0]), jnp.array([jnp.nan, jnp.inf])]))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_norm_accumulates_in_float32(dtype):
    """4096 ones in bfloat16 would stop at 256; their squares times 100 would overflow float16."""
    found = tree.norm([jnp.full(4096, 10, dtype)])
    assert found.dtype == jnp.float32
    assert_close(found, 640, 'float32 function')


def test_all_finite():
    other = {'int': jnp.array([2**31 - 1]), 'bool': jnp.array([True]), 'key': jax.random.key(0)}
    assert tree.all_finite({})
    assert tree.all_finite(other)
    assert tree.all_finite([jnp.zeros((0, 3))])
    largest = {dtype: jnp.array([jnp.finfo(dtype).max, 0], dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    assert tree.all_finite([*largest.values(), other])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64):
            assert not tree.all_finite([jnp.zeros(3), jnp.zeros(4, dtype).at[2].set(bad), other])
    assert jax.jit(tree.all_finite)([jnp.zeros(3)]).dtype == jnp.bool


# The digest as its documentation has it, in plain Python: words keyed with leaf and place, MurmurHash3's
# finaliser (Appleby), sums modulo 2^32.


def murmur(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def digest_by_hand(leaves: list[list[int]]) -> list[int]:
    low_sum = high_sum = 0
    for number, words in enumerate(leaves):
        for place, word in enumerate(words):
            key = (place * 0x9E3779B1 + number * 0x85EBCA77) % 2**32
            low = murmur(word ^ key)
            low_sum += low
            high_sum += murmur((low + key) % 2**32)
    return [low_sum % 2**32, high_sum % 2**32]


def test_murmur_by_hand():
    """fmix32 of MurmurHash3: 0 and 1 as published implementations have them."""
    assert murmur(0) == 0
    assert murmur(1) == 0x514E28B7


def test_digest_by_hand():
    made = {
        'a': jnp.array([[1.0, -2.0], [0.5, -0.0]]),
        'b': jnp.array([-1, 7], jnp.int32),
        'c': jnp.array([True, False]),
        'd': jnp.array([1.0, -1.0], jnp.bfloat16),
        'e': jnp.array([3, 255], jnp.uint8),
        'f': jnp.zeros((0, 2)),
        'g': jnp.array(1.0, jnp.float16),
        'h': jax.random.wrap_key_data(jnp.array([11, 12], jnp.uint32)),
    }
    words = [
        [0x3F800000, 0xC0000000, 0x3F000000, 0x80000000],
        [0xFFFFFFFF, 7],
        [1, 0],
        [0x3F80, 0xBF80],
        [3, 255],
        [],
        [0x3C00],
        [11, 12],
    ]
    found = tree.digest(made)
    assert found.dtype == jnp.uint32
    assert found.tolist() == digest_by_hand(words)
    assert tree.hex_digest(np.asarray(found)) == ''.join(f'{word:08x}' for word in digest_by_hand(words))


@pytest.mark.parametrize('few', [0, 5, 10**6])
def test_leaves_are_looked_at_together_or_alone_alike(monkeypatch, few):
    """Of few numbers a leaf, they are; the same leaf may be there twice."""
    monkeypatch.setattr(tree, 'FEW', few)
    rng = np.random.default_rng(few)
    twice = jnp.arange(3, dtype=jnp.uint32)
    made = [
        twice,
        jnp.float32(1),
        twice,
        jnp.zeros((0, 2)),
        jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
    ]
    words = [np.asarray(tree.words_of(leaf)).tolist() for leaf in made]
    for digest in (tree.digest, jax.jit(tree.digest)):
        assert digest(made).tolist() == digest_by_hand(words)
    for number in (1, 4):
        for bad in (jnp.nan, jnp.inf):
            last = (-1,) * jnp.ndim(made[number])
            others = [leaf.at[last].set(bad) if n == number else leaf for n, leaf in enumerate(made)]
            assert not tree.all_finite(others) and not jax.jit(tree.all_finite)(others)
    assert jax.jit(tree.all_finite)(made)


@pytest.mark.parametrize('few', [0, 5, 10**6])
def test_numbers_are_evenly_spread_over_each_leaf(monkeypatch, few):
    """In the order of the leaves, whichever of them are looked at together."""
    monkeypatch.setattr(tree, 'FEW', few)
    leaves = [
        jnp.arange(12.0).reshape(3, 4),
        jnp.arange(20.0, 24.0),
        jnp.float32(30),
        jnp.arange(40, 50, dtype=jnp.bfloat16),
    ]
    found = jax.jit(lambda leaves: tree.spread(leaves, 4))(leaves)
    assert found.dtype == jnp.float32
    assert found.tolist() == [[0, 3, 6, 9], [20, 21, 22, 23], [30] * 4, [40, 42, 45, 47]]


def test_leaves_that_lie_otherwise_on_a_mesh_are_looked_at():
    """Of explicit axes, where what lies otherwise can't be joined."""
    mesh = jax.make_mesh((1,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        made = [
            jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(mesh, jax.P(*axes)))
            for axes in ((), ('x',))
        ]
        made.append(jnp.arange(3))
        assert jax.jit(tree.all_finite)(made)
        found = jax.jit(tree.digest)(made).tolist()
    assert found == digest_by_hand([np.asarray(tree.words_of(np.asarray(leaf))).tolist() for leaf in made])


def test_hex_digest():
    assert tree.hex_digest(np.array([0xAB, 0xFFFFFFFF], np.uint32)) == '000000abffffffff'


def test_nbytes():
    assert (
        tree.nbytes({'a': jnp.zeros((3, 5)), 'b': [jnp.zeros(7, jnp.bfloat16), jnp.zeros(2, jnp.bool)]}) == 76
    )


# Bit patterns as numpy keeps them: what a leaf of each dtype is made from.
DTYPES = {
    'float32': np.uint32,
    'bfloat16': np.uint16,
    'float16': np.uint16,
    'int32': np.uint32,
    'int8': np.uint8,
    'uint8': np.uint8,
    'uint16': np.uint16,
    'bool': np.uint8,
    'complex64': np.uint32,
    'key': np.uint32,
}
SHAPE = (6, 4)


@functools.cache
def bits_of_all() -> dict[str, np.ndarray]:
    """Random bit patterns, NaNs and subnormals among them."""
    rng = np.random.default_rng(0)
    made = {
        name: rng.integers(0, np.iinfo(dtype).max, SHAPE, dtype, endpoint=True)
        for name, dtype in DTYPES.items()
    }
    return made | {'bool': made['bool'] % 2, 'key': made['key'][:, :2]}


def leaf(name: str, bits: np.ndarray) -> np.ndarray | jax.Array:
    if name == 'key':
        return jax.random.wrap_key_data(jnp.asarray(bits), impl='threefry2x32')
    return bits.view(jnp.bfloat16 if name == 'bfloat16' else name)


def leaves(bits: dict[str, np.ndarray]) -> dict:
    return {name: leaf(name, pattern) for name, pattern in bits.items()}


digest = jax.jit(tree.digest)


def of(bits: dict[str, np.ndarray]) -> list[int]:
    return digest(leaves(bits)).tolist()


deterministic = hypothesis.settings(derandomize=True, deadline=None, max_examples=300, database=None)


@deterministic
@hypothesis.given(st.sampled_from(sorted(DTYPES)), st.integers(0, 23), st.integers(0, 63))
def test_digest_notices_every_bit(name, entry, bit):
    bits = {key: pattern.copy() for key, pattern in bits_of_all().items()}
    flat = bits[name].reshape(-1)
    width = 1 if name == 'bool' else 8 * flat.itemsize
    flat[entry % flat.size] ^= np.asarray(1 << bit % width, flat.dtype)
    changed, before = of(bits), of(bits_of_all())
    assert changed[0] != before[0]
    assert changed[1] != before[1]


@deterministic
@hypothesis.given(st.integers(1, 2**32 - 1), st.integers(0, 23), st.integers(0, 23))
def test_digest_notices_two_changes_that_cancel_in_a_sum(change, one, other):
    """Words moved by opposite amounts, which a plain checksum wouldn't see."""
    hypothesis.assume(one != other)
    bits = bits_of_all()['float32'].reshape(-1)
    changes = np.zeros_like(bits)
    changes[one], changes[other] = change, 2**32 - change
    assert of({'uint32': bits + changes}) != of({'uint32': bits})


@pytest.mark.parametrize('name', [name for name in DTYPES if name != 'bool'])
def test_digest_notices_swapped_elements(name):
    bits = {key: pattern.copy() for key, pattern in bits_of_all().items()}
    bits[name][[0, 5]] = bits[name][[5, 0]]
    assert of(bits) != of(bits_of_all())


def test_digest_notices_swapped_leaves():
    a, b = (jnp.asarray(bits, jnp.uint32) for bits in (bits_of_all()['float32'], bits_of_all()['int32']))
    assert digest([a, b]).tolist() != digest([b, a]).tolist()
    assert digest([a, a, b]).tolist() != digest([a, b, b]).tolist()
    assert digest([a, jnp.zeros(3), b]).tolist() != digest([a, b, jnp.zeros(3)]).tolist()


def test_digest_notices_the_sign_of_zero_and_of_nan():
    assert digest(jnp.array([0.0])).tolist() != digest(jnp.array([-0.0])).tolist()
    nan = np.array([0x7FC00000], np.uint32).view(np.float32)
    other = np.array([0xFFC00000], np.uint32).view(np.float32)
    assert digest(nan).tolist() != digest(other).tolist()


def test_equal_trees_have_equal_digests():
    bits = bits_of_all()
    copies = {name: pattern.copy() for name, pattern in bits.items()}
    assert of(bits) == of(copies)
    assert tree.digest(leaves(bits)).tolist() == of(bits)  # outside jit and in it
    assert tree.digest({}).tolist() == [0, 0]
    a = jnp.asarray(bits['float32'])
    assert digest([a]).tolist() == digest({'x': a.reshape(-1)}).tolist()  # bits alone count


@pytest.mark.skipif(not hasattr(jax, 'enable_x64'), reason='came with JAX 0.8')
def test_digest_of_float64():
    with jax.enable_x64(True):
        values = np.array([1.0, -np.pi, 1e300])
        words = values.view(np.uint32).tolist()  # low half first, as XLA has it
        assert tree.digest([jnp.asarray(values)]).tolist() == digest_by_hand([words])
