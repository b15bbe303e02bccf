"""Cells, layers and networks against the float64 oracle: values, gradients, extreme numbers."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from tolerance import assert_close

from jaxrnn import tree
from jaxrnn.rnn import cells, layers, scan
from jaxrnn.words import config, models

GATES = {'sigmoid': cells.SIGMOID, 'hard_sigmoid': cells.HARD_SIGMOID}

HOW = {
    'cpu': {'plan': scan.CPU},
    'large batch': {'plan': scan.CPU_LARGE_BATCH},
    'accelerator': {'plan': scan.ACCELERATOR},
    'some unrolled': {'plan': scan.Plan(features_first=True, unroll=4, scatter_from=0)},
    'reference': {'reference': True},
}

CELLS = {
    # name: gates, blocks of recurrent bias, carry
    'lstm': (4, 0, ('c', 'h')),
    'gru_reset_before': (3, 0, ('h',)),
    'gru_reset_after': (3, 0, ('h',)),
    'gru_reset_after_candidate_bias': (3, 1, ('h',)),
    'gru_reset_after_two_biases': (3, 3, ('h',)),
}

SIZES = ((1, 1, 1, 1), (1, 3, 2, 4), (6, 1, 3, 1), (9, 2, 4, 5))
"""T, B, D, H."""

EXTREMES = {
    'huge': (1e30, -1e30),
    'zero': (0.0, -0.0),
    'subnormal': (1e-40, -1e-40),
    'mixed': (1e30, -1e30, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0),
}

each_cell = pytest.mark.parametrize('cell', CELLS)
each_gate = pytest.mark.parametrize('gate', GATES)
each_how = pytest.mark.parametrize('how', HOW)
each_preset = pytest.mark.parametrize('preset', cells.PRESETS)


def draw(cell: str, sizes: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """float32 weights, inputs and carry, large enough that hard_sigmoid saturates at times."""
    steps, batch, width_in, width = sizes
    gates, recurrent_bias, carry = CELLS[cell]
    shapes = {
        'kernel': (width_in, gates * width),
        'recurrent_kernel': (width, gates * width),
        'bias': (gates * width,),
        'xs': (steps, batch, width_in),
        **dict.fromkeys(carry, (batch, width)),
    }
    if recurrent_bias:
        shapes['recurrent_bias'] = (recurrent_bias * width,)
    rng = np.random.default_rng(sum(sizes))
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    drawn['kernel'] *= 1.5 / np.sqrt(width_in)
    drawn['recurrent_kernel'] *= 1.5 / np.sqrt(width)
    return drawn


def ours(cell: str, gate: str, values: dict, *, sequences: bool = True, how: str = 'cpu') -> jax.Array:
    weights = scan.Weights(
        values['kernel'], values['bias'], values['recurrent_kernel'], values.get('recurrent_bias')
    )
    made = getattr(cells, cell.removesuffix('_candidate_bias').removesuffix('_two_biases'))(GATES[gate])
    carry = made.carry(**{name: values[name] for name in made.carry._fields})
    xs = jnp.asarray(values['xs'])
    outputs, last = scan.run(made, weights, xs, carry, sequences=sequences, **HOW[how])
    return outputs if sequences else last.h


def theirs(cell: str, gate: str, values: dict) -> np.ndarray:
    values = {name: np.asarray(value, np.result_type(value, np.float64)) for name, value in values.items()}
    function = getattr(oracle, cell.removesuffix('_candidate_bias').removesuffix('_two_biases'))
    return function(**values, gate=oracle.GATES[gate])


def drawn_like(outputs: np.ndarray) -> np.ndarray:
    """Weights of a sum over all outputs, so that each counts differently."""
    return np.random.default_rng(1).normal(size=outputs.shape).astype(np.float32)


def test_complex_steps_agree_with_central_differences():
    values = draw('gru_reset_after_two_biases', (3, 2, 2, 3))
    weights = drawn_like(np.empty((3, 2, 3)))

    def f(v):
        return np.sum(weights * theirs('gru_reset_after_two_biases', 'sigmoid', v))

    found, expected = oracle.gradients(f, values), oracle.central_differences(f, values)
    for name in values:
        assert_close(found[name], expected[name], 'float64 differences')


@functools.cache
def outputs_and_slopes(cell: str, gate: str, how: str):
    """Compiled: values, weights -> outputs [T, B, H], slopes of their weighted sum by name."""

    def loss(values, weights):
        outputs = ours(cell, gate, values, how=how)
        return jnp.sum(weights * outputs), outputs

    def run(values, weights):
        (_, outputs), slopes = jax.value_and_grad(loss, has_aux=True)(values, weights)
        return outputs, slopes

    return jax.jit(run)


@functools.cache
def their_outputs_and_slopes(cell: str, gate: str, sizes: tuple[int, int, int, int]):
    """The oracle's, as `outputs_and_slopes` of what `draw` draws."""
    values = draw(cell, sizes)
    outputs = theirs(cell, gate, values)
    weights = drawn_like(outputs)
    return outputs, oracle.gradients(lambda v: np.sum(weights * theirs(cell, gate, v)), values)


def combinations():
    """All; of which those of the other gate or of a plan that little else uses, at the smaller sizes, are a battery."""
    for cell, gate, sizes, how in itertools.product(CELLS, GATES, SIZES, HOW):
        telling = sizes == SIZES[-1] or (gate == 'sigmoid' and how in ('cpu', 'accelerator'))
        marks = () if telling else pytest.mark.battery
        yield pytest.param(cell, gate, sizes, how, marks=marks, id=f'{sizes}-{cell}-{gate}-{how}')


@pytest.mark.parametrize('cell, gate, sizes, how', list(combinations()))
def test_values_and_gradients(cell, gate, sizes, how):
    expected, slopes = their_outputs_and_slopes(cell, gate, sizes)
    outputs, found = outputs_and_slopes(cell, gate, how)(draw(cell, sizes), drawn_like(expected))
    assert_close(outputs, expected, 'float32 forward')
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert_close(found[name], slope, 'float32 gradient')


def larger():
    """All; of which those of plans that little else uses are a battery, but for the LSTM with its usual gate."""
    for cell, gate, how in itertools.product(CELLS, GATES, HOW):
        telling = how in ('cpu', 'accelerator') or (cell, gate) == ('lstm', 'sigmoid')
        marks = () if telling else pytest.mark.battery
        yield pytest.param(cell, gate, how, marks=marks, id=f'{cell}-{gate}-{how}')


@pytest.mark.parametrize('cell, gate, how', list(larger()))
def test_values_at_a_larger_size(cell, gate, how):
    values = draw(cell, (19, 8, 28, 64))
    expected = theirs(cell, gate, values)
    run = jax.jit(functools.partial(ours, cell, gate, how=how), static_argnames='sequences')
    assert_close(run(values), expected, 'float32 forward')
    assert_close(run(values, sequences=False), expected[-1], 'float32 forward')


@pytest.mark.parametrize('how', ['cpu', 'accelerator', 'reference'])
@each_gate
@each_cell
def test_extreme_numbers_give_finite_outputs_and_gradients(cell, gate, how):
    values = draw(cell, SIZES[-1])
    weights = drawn_like(theirs(cell, gate, values))
    carry = CELLS[cell][2]
    some = [('xs',), *((name,) for name in carry), ('xs', *carry)]
    for extreme, names in itertools.product(EXTREMES, some):
        changed = values | {name: filled(values[name].shape, extreme) for name in names}
        outputs, slopes = outputs_and_slopes(cell, gate, how)(changed, weights)
        assert_finite({'outputs': outputs, **slopes}, f'{extreme} {names}')


def filled(shape: tuple[int, ...], extreme: str) -> np.ndarray:
    """The extreme numbers in random order, times random factors: where two of equal magnitude cancel
    again and again, a gate behind weights of 1e30 has a slope, and the true gradient is 1e60."""
    rng = np.random.default_rng(0)
    return np.asarray(rng.choice(EXTREMES[extreme], shape) * rng.uniform(0.5, 1, shape), np.float32)


def assert_finite(arrays: dict, what: str) -> None:
    for name, array in arrays.items():
        assert np.all(np.isfinite(array)), f'{what}: {name}'


def test_hard_sigmoid_by_hand():
    x = jnp.array([-1e30, -3, -2.5, -1, -0.0, 0, 1, 2, 2.5, 3, 1e30], jnp.float32)
    expected = [0, 0, 0, 0.3, 0.5, 0.5, 0.7, 0.9, 1, 1, 1]
    assert_close(cells.hard_sigmoid(x), expected, 'float32 function')


def test_hard_sigmoid_has_no_slope_beyond_two_and_a_half():
    slope = jax.vmap(jax.grad(cells.hard_sigmoid))
    beyond = jnp.array([2.50001, 2.6, 3, 100, 1e30], jnp.float32)
    assert np.all(slope(jnp.concatenate([beyond, -beyond])) == 0)
    within = jnp.array([-2.49, -1, 0, 1, 2.49], jnp.float32)
    assert_close(slope(within), np.full(5, 0.2), 'float32 function')


@each_how
@pytest.mark.parametrize('cell', [name for name in CELLS if name != 'lstm'])
def test_gru_keeps_its_digits_near_z_of_one(cell, how):
    """At a_z = 20, 1 - sigmoid(a_z) is 0 in float32; the candidate's true share is 2.1e-9."""
    assert 1 - jax.nn.sigmoid(jnp.float32(20)) == 0
    values = {name: np.zeros_like(value) for name, value in draw(cell, (1, 1, 1, 1)).items()}
    values['bias'] = np.array([20, 0, 1], np.float32)
    expected = theirs(cell, 'sigmoid', values)
    assert 1.5e-9 < expected.item() < 1.6e-9  # 2.06e-9 tanh(1)
    assert_close(ours(cell, 'sigmoid', values, how=how), expected, 'float32 function')


def test_letters_stand_for_one_hot_rows():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(28, 12)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    letters = rng.integers(0, 28, (7, 5), np.int32)
    weights = rng.normal(size=(7, 5, 12)).astype(np.float32)
    assert np.array_equal(scan.project(kernel, bias, letters), kernel[letters] + bias)

    def weighted(kernel):
        return jnp.sum(weights * scan.project(kernel, bias, jnp.asarray(letters)))

    expected = np.zeros(kernel.shape)
    np.add.at(expected, letters, weights)
    assert_close(jax.grad(weighted)(kernel), expected, 'float32 gradient')


# What each preset must be, by name in the oracle: LSTM's and GRU's gate, the GRU.
PRESETS = {
    'keras1': ('hard_sigmoid', 'gru_reset_before'),
    'keras3': ('sigmoid', 'gru_reset_after_two_biases'),
    'flax': ('sigmoid', 'gru_reset_after_candidate_bias'),
}


class Compiled(NamedTuple):
    """A layer or network as a function of its parameters, which are drawn here, biases and all."""

    params: dict
    forward: Callable[..., jax.Array]  # params, x -> outputs
    slopes: Callable  # params, x, weights -> (weighted sum, outputs), slopes of the sum


def compiled(build: Callable[[], nnx.Module], *, by_input: bool, **options: bool) -> Compiled:
    """`by_input`: slopes are those by params and x, else by params alone; `options` of the module's call."""
    graph, state = nnx.split(nnx.eval_shape(build), nnx.Param)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])).astype(np.float32),
        nnx.to_pure_dict(state),
    )

    def forward(params, x, **options):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(x, **options)

    def loss(params, x, weights):
        outputs = forward(params, x, **options)
        return jnp.sum(weights * outputs), outputs

    slopes = jax.value_and_grad(loss, argnums=(0, 1) if by_input else (0,), has_aux=True)
    return Compiled(params, jax.jit(forward, static_argnames=tuple(options)), jax.jit(slopes))


@functools.cache
def compiled_layer(kind: str, preset: str) -> Compiled:
    def build():
        return getattr(layers, kind)(5, 6, preset=cells.PRESETS[preset], rngs=nnx.Rngs(0))

    return compiled(build, by_input=True, **({} if kind == 'Dense' else {'time_major': True}))


@functools.cache
def compiled_network(name: str, preset: str) -> Compiled:
    options = config.Model(network=name, preset=preset, hidden=4)
    build = functools.partial(models.build, options, letters=5, vector_size=3, key=jax.random.key(0))
    return compiled(build, by_input=False)


def recurrent(preset: str, kind: str, xs: np.ndarray, params: dict) -> np.ndarray:
    """The oracle of a recurrent layer, from a carry of zeros."""
    gate, gru = PRESETS[preset]
    zeros = np.zeros((xs.shape[1], params['recurrent_kernel'].shape[0]))
    if kind == 'LSTM':
        return theirs('lstm', gate, {'xs': xs, 'c': zeros, 'h': zeros, **params})
    return theirs(gru, gate, {'xs': xs, 'h': zeros, **params})


FLOATS = np.random.default_rng(1).normal(size=(6, 3, 5)).astype(np.float32)
LETTERS = np.random.default_rng(1).integers(0, 5, (6, 3), np.int32)


@each_preset
@pytest.mark.parametrize('kind', ['LSTM', 'GRU'])
def test_layers(kind, preset):
    layer = compiled_layer(kind, preset)
    expected = recurrent(preset, kind, FLOATS, layer.params)
    (_, found), _ = layer.slopes(layer.params, FLOATS, drawn_like(expected))
    assert_close(found, expected, 'float32 forward')
    expected = recurrent(preset, kind, np.eye(5)[LETTERS], layer.params)
    found = layer.forward(layer.params, LETTERS, time_major=True)
    assert_close(found, expected, 'float32 forward')


def network(name: str, preset: str, letters: np.ndarray, params: dict) -> np.ndarray:
    """The oracle of a network (design, section 5)."""
    xs = np.eye(5)[letters]
    if name in ('lstm', 'gru'):
        return oracle.dense(recurrent(preset, name.upper(), xs, params['recurrent'])[-1], **params['output'])
    lower = recurrent(preset, 'LSTM', xs, params['lower'])
    between = oracle.sigmoid(oracle.dense(lower, **params['between']))
    upper = recurrent(preset, 'LSTM', between, params['upper'])
    return oracle.dense(np.tanh(oracle.dense(upper[-1], **params['narrow'])), **params['output'])


def nested(flat: dict) -> dict:
    made: dict = {}
    for path, leaf in flat.items():
        layer, name = path.split('/')
        made.setdefault(layer, {})[name] = leaf
    return made


@each_preset
@pytest.mark.parametrize('name', models.WIDTHS)
def test_networks(name, preset):
    params = compiled_network(name, preset).params
    expected = network(name, preset, LETTERS, params)
    weights = drawn_like(expected)
    (_, outputs), (found,) = compiled_network(name, preset).slopes(params, LETTERS, weights)
    assert_close(outputs, expected, 'float32 forward')
    flat = {f'{layer}/{leaf}': value for layer, leaves in params.items() for leaf, value in leaves.items()}
    slopes = oracle.gradients(lambda v: np.sum(weights * network(name, preset, LETTERS, nested(v))), flat)
    for path, slope in slopes.items():
        layer, leaf = path.split('/')
        assert_close(found[layer][leaf], slope, 'float32 gradient')


@each_preset
@pytest.mark.parametrize('kind', ['LSTM', 'GRU', 'Dense'])
def test_layers_of_extreme_numbers_are_finite(kind, preset):
    layer = compiled_layer(kind, preset)
    assert_finite_at_extremes(
        lambda args: layer.slopes(*args, drawn_like(np.empty((6, 3, 6)))), (layer.params, FLOATS)
    )


@each_preset
@pytest.mark.parametrize('name', models.WIDTHS)
def test_networks_of_extreme_weights_are_finite(name, preset):
    network = compiled_network(name, preset)
    assert_finite_at_extremes(
        lambda params: network.slopes(params, LETTERS, drawn_like(np.empty((3, 3)))), network.params
    )


def assert_finite_at_extremes(slopes: Callable, args: Any) -> None:
    """That outputs and slopes stay finite when any one of the arrays in `args` is extreme."""
    leaves, structure = jax.tree.flatten(args)
    for extreme, at in itertools.product(EXTREMES, range(len(leaves))):
        changed = [filled(leaf.shape, extreme) if i == at else leaf for i, leaf in enumerate(leaves)]
        found = slopes(jax.tree.unflatten(structure, changed))
        assert_finite(tree.named_leaves(found), f'{extreme} {list(tree.named_leaves(args))[at]}')
