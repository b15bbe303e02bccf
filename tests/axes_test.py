"""Names of axes against arrays whose elements say where they came from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax import lax
from jax.extend import core

from jaxrnn.trace import axes
from jaxrnn.trace.devices import Devices
from jaxrnn.trace.meaning import AxisMeaning

SHAPE = (4, 6, 2)

MOVES = {
    'transpose': lambda x: jnp.transpose(x, (2, 0, 1)[: x.ndim] if x.ndim == 3 else None),
    'merge': lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]),
    'split': lambda x: x.reshape(x.shape[0] // 2, 2, *x.shape[1:]),
    'split the last': lambda x: x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2),
    'flatten': lambda x: x.reshape(-1),
    'a slice': lambda x: x[1:3],
    'every second': lambda x: x[::2],
    'reversed': lambda x: x[::-1],
    'one place': lambda x: x[2],
    'the last place': lambda x: x[:, -1],
    'a place that keeps its axis': lambda x: x[1:2],
    'taken apart and stacked': lambda x: jnp.stack([x[n] for n in range(len(x))]),
    'taken apart and stacked backwards': lambda x: jnp.stack([x[n] for n in reversed(range(len(x)))]),
    'cut and joined': lambda x: jnp.concatenate([x[:2], x[2:]]),
    'a new axis': lambda x: x[:, None],
    'cumulated': lambda x: jnp.maximum(x, x),
    'selected': lambda x: jnp.where(x >= 0, x, 0),
    'scanned': lambda x: lax.scan(lambda carry, row: (carry, row), 0, x)[1],
    'scanned backwards': lambda x: lax.scan(lambda carry, row: (carry, row), 0, x, reverse=True)[1],
    'the last of a scan': lambda x: lax.scan(lambda carry, row: (row, None), x[0], x[-1:])[0],
    'jitted': lambda x: jax.jit(lambda x: x.swapaxes(0, 1))(x),
    'mapped': lambda x: jax.vmap(lambda row: row[::-1])(x),
    'a product with ones': lambda x: jnp.einsum('ij...,k->kij...', x, jnp.ones(1, x.dtype)),
    'gathered': lambda x: jnp.take(x, jnp.array([1, 0]), axis=-1)[..., ::-1],
    'padded and cut': lambda x: jnp.pad(x, [(1, 1)] + [(0, 0)] * (x.ndim - 1))[1:-1],
    'rematerialised': lambda x: jax.checkpoint(lambda x: x.swapaxes(0, 1))(x),
    'branched': lambda x: lax.cond(True, lambda x: x[1:], lambda x: x[:-1] * 1, x) if len(x) > 1 else x,
}

FORGETS = {'gathered': {-1}, 'the last of a scan': {0}, 'branched': {0}}
"""Axes whose places are lost, since they depend on values."""


def through(closed, ins, late=True):
    return AxisMeaning(Devices()).through(closed.jaxpr, ins, late)


def check(move, forgets=frozenset()):
    sources = [jnp.broadcast_to(jnp.arange(n).reshape([-1 if k == axis else 1 for k in range(3)]), SHAPE)
               for axis, n in enumerate(SHAPE)]  # fmt: skip
    closed = jax.make_jaxpr(move)(sources[0])
    (found,) = through(closed, [axes.named('x', SHAPE)])
    moved = [np.asarray(move(source)) for source in sources]
    assert found.shape == moved[0].shape
    for index in np.ndindex(*found.shape):
        for name, place in found.places(index).items():
            axis = int(name.removeprefix('x:'))
            assert axis in forgets or place == moved[axis][index], (name, index)
    return found


@pytest.mark.parametrize('name', MOVES)
def test_places_are_followed(name):
    lost = {axis % 3 for axis in FORGETS.get(name, ())}
    if 'gather' in str(jax.make_jaxpr(MOVES[name])(jnp.zeros(SHAPE))) or 'dynamic_slice' in str(
        jax.make_jaxpr(MOVES[name])(jnp.zeros(SHAPE))
    ):  # how older versions of JAX take places: which ones is known at run time only
        check(MOVES[name], lost)
        return
    found = check(MOVES[name], lost)
    known = found.names() | dict(found.fixed).keys()
    assert {f'x:{axis}' for axis in range(3) if axis not in lost} <= known


PAIRS = [
    (first, second)
    for first, second in itertools.permutations(MOVES, 2)
    if first not in FORGETS and second not in FORGETS
]


@pytest.mark.parametrize('pair', PAIRS[:: len(PAIRS) // 60], ids=' then '.join)
def test_places_are_followed_through_two(pair):
    first, second = (MOVES[name] for name in pair)
    try:
        jax.eval_shape(lambda x: second(first(x)), jnp.zeros(SHAPE))
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        pytest.skip('the second does not take what the first gives')
    check(lambda x: second(first(x)))


def test_products_keep_what_is_not_summed_over():
    def product(x, w):
        return jnp.einsum('tbi,ij->bjt', x, w)

    closed = jax.make_jaxpr(product)(jnp.zeros(SHAPE), jnp.zeros((2, 5)))
    (found,) = through(closed, [axes.named('x', SHAPE), axes.unknown((2, 5))])
    assert found.places((3, 4, 2)) == {'x:0': 2, 'x:1': 3}


def test_a_lookup_has_the_axes_of_its_indices():
    def look_up(letters, table):
        return jnp.take(table, letters, axis=0)

    closed = jax.make_jaxpr(look_up)(jnp.zeros((4, 6), int), jnp.zeros((27, 3)))
    (found,) = through(closed, [axes.named('x', (4, 6)), axes.unknown((27, 3))])
    assert found.places((3, 5, 1)) == {'x:0': 3, 'x:1': 5}


def test_two_values_of_one_time():
    """h_3 is computed of x_3 and h_2; its gradient of x_3 and the gradient of h_4."""

    def later(x):
        return x[2] + x[3]

    closed = jax.make_jaxpr(later)(jnp.zeros(SHAPE))
    for late, place in ((True, 3), (False, 2)):
        (found,) = through(closed, [axes.named('x', SHAPE)], late)
        assert found.places((0, 0))['x:0'] == place


def test_an_operation_that_nobody_knows_has_no_names():
    (found,) = axes.follow('something new', {}, [axes.named('x', (3, 4))], [(4, 3)])
    assert found.names() == set() and found.shape == (4, 3)


def test_a_place_that_meets_the_whole_axis():
    """x - x[3] is of each time, x[3] - x[2] of one."""
    closed = jax.make_jaxpr(lambda x: x - jnp.broadcast_to(x[3], x.shape))(jnp.zeros(SHAPE))
    (found,) = through(closed, [axes.named('x', SHAPE)])
    assert found.places((1, 0, 0))['x:0'] == 1


def test_a_place_within_a_place():
    """Of time in chunks, one is taken, and a step of it: in either order."""
    for take in (lambda x: x.reshape(2, 3, 4)[1, 2], lambda x: x.reshape(2, 3, 4)[:, 2][1]):
        closed = jax.make_jaxpr(take)(jnp.zeros((6, 4)))
        (found,) = through(closed, [axes.named('x', (6, 4))])
        assert found.places((0,)) == {'x:0': 5, 'x:1': 0}


def test_half_of_an_axis_that_was_split_has_no_name():
    """Its places would be those of one example among several."""
    (halves,) = axes.follow('reshape', {}, [axes.named('x', (6,))], [(3, 2)])
    assert halves.places((2, 1)) == {'x:0': 5}
    for name, params, shape in (
        ('reduce_sum', {'axes': (1,)}, (3,)),
        ('reduce_sum', {'axes': (0,)}, (2,)),
        ('dynamic_slice', {'slice_sizes': (3, 1)}, (3, 1)),
    ):
        (found,) = axes.follow(name, params, [halves], [shape])
        assert found.names() == set() and found.fixed == ()


def test_every_primitive_has_a_rule_or_no_names():
    """Of whatever JAX has, and with parameters that nobody has seen."""
    names = {value.name for key, value in vars(core.primitives).items() if key.endswith('_p')}
    assert len(names) > 150
    without = {name for name in names if not axes.has_rule(name)}
    assert {'sort', 'cholesky', 'cumsum', 'gather', 'add'} & without == set()
    assert {'custom_linear_solve', 'random_bits', 'while'} <= without
    for name in (*without, 'something new'):
        ins = [axes.named('x', (4, 4)), axes.named('y', (4, 4))]
        for found in axes.follow(name, {}, ins, [(4, 4), (4, 4)]):
            assert found.names() == set(), name
    for name in names - without:  # with parameters of another version
        for found in axes.follow(name, {}, [axes.named('x', (4, 4))] * 2, [(4, 4)]):
            assert found.shape == (4, 4), name


@pytest.mark.parametrize(
    'name', sorted({*programs.MOVES} - {'above the least'})
)  # of which one is a constant
def test_an_element_depends_on_the_example_that_it_names(name):
    """Whatever an operation does, an element changes with the example whose name it has."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (programs.B, programs.T, programs.D)).astype(np.float32)

    def move(x):
        return programs.MOVES[name](x, np.random.default_rng(1))

    closed = jax.make_jaxpr(move)(x)
    (found,) = through(closed, [axes.named('x', x.shape)])
    if 'x:0' not in found.names() | dict(found.fixed).keys():
        return
    gradient = np.asarray(jax.jacrev(move)(x + 0.01 * np.arange(x.size).reshape(x.shape) ** 0.5))
    for index in np.ndindex(*found.shape):
        place = found.places(index).get('x:0', -1)
        if 0 <= place < programs.B:  # else it is what was padded
            assert (gradient[index][place] != 0).any(), (index, place)
