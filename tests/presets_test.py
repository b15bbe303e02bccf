"""Presets: how weights are drawn, which biases there are, the networks' shapes, and flax's own cells."""

import dataclasses
import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close

from jaxrnn import tree
from jaxrnn.rnn import cells, layers
from jaxrnn.words import config, models, presets, remedies

KERAS1, KERAS3, FLAX = (cells.PRESETS[name] for name in ('keras1', 'keras3', 'flax'))
LAYERS = {'LSTM': (layers.LSTM, 4), 'GRU': (layers.GRU, 3)}

each_preset = pytest.mark.parametrize('preset', cells.PRESETS)
each_layer = pytest.mark.parametrize('layer', LAYERS)


@functools.cache
def recurrent_blocks(preset: str, layer: str) -> list[np.ndarray]:
    """The recurrent kernel of a layer of width 64, as drawn, one [H, H] block for each gate."""
    make, gates = LAYERS[layer]
    made = make(3, 64, preset=cells.PRESETS[preset], rngs=nnx.Rngs(0))
    return np.split(np.asarray(made.recurrent_kernel[...], np.float64), gates, axis=1)


def root_mean_square_singular_value(block: np.ndarray) -> float:
    return np.sqrt(np.mean(np.square(np.linalg.svd(block, compute_uv=False))))


@each_layer
@pytest.mark.parametrize(('preset', 'gain'), [('keras1', 1.1), ('flax', 1.0)])
def test_recurrent_kernels_orthogonal_per_gate(preset, gain, layer):
    blocks = recurrent_blocks(preset, layer)
    for block in blocks:
        assert_close(block.T @ block, gain**2 * np.eye(64), 'float32 orthogonal')
    assert len({block.tobytes() for block in blocks}) == len(blocks)  # each gate has a draw of its own


@each_layer
def test_recurrent_kernel_orthogonal_jointly(layer):
    blocks = recurrent_blocks('keras3', layer)
    joint = np.concatenate(blocks, axis=1)
    assert_close(joint @ joint.T, np.eye(64), 'float32 orthogonal')
    # The square of a row's norm is 1 over all gates, so 1/4 or 1/3 a gate, give or take its spread in a draw.
    expected = {'LSTM': 0.5, 'GRU': 0.577}[layer]
    found = [root_mean_square_singular_value(block) for block in blocks]
    assert_close(found, np.full(len(blocks), expected), 'statistic')
    for block in blocks:
        singular = np.linalg.svd(block, compute_uv=False)
        assert singular.max() > 1.3 * expected > 0.7 * expected > singular.min()  # no gate is orthogonal


def test_orthogonal_draws_have_no_preferred_sign():
    """A QR whose signs aren't put right leaves the diagonal all negative."""
    for preset in cells.PRESETS:
        diagonal = np.diagonal(recurrent_blocks(preset, 'LSTM')[0])
        assert 16 < np.sum(diagonal > 0) < 48


@pytest.mark.parametrize(('preset', 'limit'), [('keras1', 0.0755), ('keras3', 0.0381)])
def test_glorot_limits_at_the_width_of_the_question(preset, limit):
    kernel = np.asarray(cells.PRESETS[preset].kernel(jax.random.key(0), (28, 4 * 1024), 4))
    fan_out = {'keras1': 1024, 'keras3': 4 * 1024}[preset]
    exact = np.sqrt(6 / (28 + fan_out))
    assert exact == pytest.approx(limit, rel=2e-3)
    for gate in np.split(kernel, 4, axis=1):
        assert 0.999 * exact < gate.max() <= exact
        assert 0.999 * exact < -gate.min() <= exact
        assert_close(np.std(gate), exact / np.sqrt(3), 'statistic')  # uniform
        assert abs(np.mean(gate)) < 0.02 * exact


def test_flax_kernels_are_lecun_normal():
    kernel = np.asarray(FLAX.kernel(jax.random.key(0), (28, 4 * 1024), 4))
    for gate in np.split(kernel, 4, axis=1):
        assert_close(np.std(gate), 0.189, 'statistic')  # 1 / sqrt(28)
        # a normal cut off at two standard deviations, 0.8796 of which are left
        assert 0.99 < gate.max() * 0.87962566 / 2 * np.sqrt(28) <= 1.000001


@each_preset
def test_gates_of_a_kernel_differ(preset):
    kernel = np.asarray(cells.PRESETS[preset].kernel(jax.random.key(0), (5, 12), 4))
    assert len({gate.tobytes() for gate in np.split(kernel, 4, axis=1)}) == 4


@pytest.mark.parametrize(('preset', 'limit'), [('keras1', 0.0731), ('keras3', 0.0731), ('flax', None)])
def test_dense_kernels(preset, limit):
    dense = layers.Dense(1024, 100, preset=cells.PRESETS[preset], rngs=nnx.Rngs(0))
    kernel = np.asarray(dense.kernel[...])
    if limit:
        assert limit == pytest.approx(np.sqrt(6 / 1124), rel=1e-3)
        assert 0.999 * np.sqrt(6 / 1124) < np.abs(kernel).max() <= np.sqrt(6 / 1124)
    else:
        assert_close(np.std(kernel), 1 / 32, 'statistic')
    assert np.array_equal(dense.bias[...], np.zeros(100))


@pytest.mark.parametrize(('preset', 'forget'), [('keras1', 1), ('keras3', 1), ('flax', 0)])
def test_forget_bias(preset, forget):
    layer = layers.LSTM(2, 3, preset=cells.PRESETS[preset], rngs=nnx.Rngs(0))
    assert np.array_equal(layer.bias[...], [0, 0, 0, forget, forget, forget, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(('preset', 'width'), [('keras1', None), ('keras3', 15), ('flax', 5)])
def test_biases_of_the_gru(preset, width):
    layer = layers.GRU(2, 5, preset=cells.PRESETS[preset], rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert np.array_equal(params['bias'], np.zeros(15))
    if width is None:
        assert params.keys() == {'kernel', 'recurrent_kernel', 'bias'}
    else:
        assert np.array_equal(params['recurrent_bias'], np.zeros(width))


def test_gates_and_adams():
    hard, soft = cells.HARD_SIGMOID, cells.SIGMOID
    found = {name: (p.gate, p.reset_after, p.epsilon, p.epsilon_hat) for name, p in cells.PRESETS.items()}
    assert found == {
        'keras1': (hard, False, 1e-8, True),
        'keras3': (soft, True, 1e-7, True),
        'flax': (soft, True, 1e-8, False),
    }


def completed(*given: str, **options) -> dict[str, object]:
    """What a preset sets, over options of which some are the user's own."""
    asked = config.Config().changed(max_steps=700, **options)
    before, after = asked.to_json(), presets.completed(asked, given).to_json()
    return {
        name: value
        for group, values in after.items()
        for name, value in values.items()
        if value != before[group][name]
    }


def test_what_stable_sets():
    assert completed(preset='stable') == {
        'initial_weights': 'keras1', 'learning_rate': 5e-4, 'schedule': 'warmup_cosine', 'decay_steps': 700,
        'update_clip': 1.0,
    }  # fmt: skip


@pytest.mark.parametrize('preset', ['keras1', 'keras3', 'flax'])
def test_a_librarys_preset_sets_no_option(preset):
    assert completed(preset=preset) == {}


def test_what_is_given_stays():
    """Even at its usual default; and a schedule of the user's own is not bent by part of another one."""
    own = ('initial_weights', 'learning_rate', 'schedule', 'update_clip')
    assert completed(*own, preset='stable', learning_rate=0.1, schedule='exponential') == {}
    assert completed('learning_rate', 'decay_steps', preset='stable') == {
        'initial_weights': 'keras1', 'schedule': 'warmup_cosine', 'update_clip': 1.0,
    }  # fmt: skip


def test_every_choice_has_a_network():
    names = config.Model.__dataclass_fields__['preset'].metadata['choices']
    found = {name: presets.network_of(name) for name in names}
    assert found == {**cells.PRESETS, 'stable': KERAS3}
    assert {*presets.SETTINGS, *presets.NETWORKS} <= set(names)


@pytest.mark.parametrize('network', ['lstm', 'gru', 'stacked'])
def test_initial_weights_of_another_library(network):
    """The matrices are its own, number by number; biases, gates and the variant of the GRU stay."""

    def made(**options) -> tuple[dict[str, np.ndarray], nnx.Module]:
        options = config.Model(network=network, hidden=8, **options)
        module = models.build(options, letters=5, vector_size=3, key=jax.random.key(0))
        params = tree.named_leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
        return {name: np.asarray(leaf) for name, leaf in params.items()}, module

    (mixed, module), (cells_of, own), (weights_of, _) = (
        made(preset='keras3', initial_weights='keras1'), made(preset='keras3'), made(preset='keras1'),
    )  # fmt: skip
    assert mixed.keys() == cells_of.keys()
    for name, leaf in mixed.items():
        np.testing.assert_array_equal(leaf, (weights_of if name.endswith('kernel') else cells_of)[name], name)
    assert nnx.graphdef(module) == nnx.graphdef(own)
    kernels = [name for name in mixed if name.endswith('recurrent_kernel')]
    assert kernels and all(not np.array_equal(mixed[name], cells_of[name]) for name in kernels)


def test_a_gain_belongs_to_the_initial_weights():
    options = config.Model(preset='keras3', initial_weights='keras1', hidden=8)
    of_gain_2 = dataclasses.replace(options, recurrent_gain=2.0)
    assert [remedies.gain(config.Config(model=each)) for each in (options, of_gain_2)] == [1.1, 2.0]
    assert remedies.gain(config.Config(model=config.Model(preset='keras3'))) == 1.0
    made = models.build(of_gain_2, letters=5, vector_size=3, key=jax.random.key(0))
    found = np.linalg.svd(made.recurrent.recurrent_kernel[:, :8], compute_uv=False)
    assert_close(found, np.full(8, 2.0), 'float32 orthogonal')


def built(**options) -> nnx.Module:
    """The abstract network: its shapes, without the time to draw it."""
    make = functools.partial(models.build, config.Model(**options), letters=28, vector_size=100)
    return nnx.eval_shape(lambda: make(key=jax.random.key(0)))


def shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return {name: leaf.shape for name, leaf in tree.named_leaves(params).items()}


def count(found: dict[str, tuple[int, ...]], layer: str) -> int:
    return sum(int(np.prod(shape)) for name, shape in found.items() if name.startswith(f'{layer}/'))


def test_parameter_count_of_the_question():
    found = shapes(built())
    assert count(found, 'recurrent') == 4_313_088
    assert count(found, 'output') == 102_500


@pytest.mark.parametrize('hidden', [0, 6, 1])
def test_shapes_of_the_networks(hidden):
    wide, wide_stacked = hidden or 1024, hidden or 512
    narrow = max(wide_stacked // 2, 1)
    assert shapes(built(network='lstm', hidden=hidden)) == {
        'recurrent/kernel': (28, 4 * wide),
        'recurrent/recurrent_kernel': (wide, 4 * wide),
        'recurrent/bias': (4 * wide,),
        'output/kernel': (wide, 100),
        'output/bias': (100,),
    }
    assert shapes(built(network='gru', hidden=hidden)) == {
        'recurrent/kernel': (28, 3 * wide),
        'recurrent/recurrent_kernel': (wide, 3 * wide),
        'recurrent/bias': (3 * wide,),
        'recurrent/recurrent_bias': (3 * wide,),
        'output/kernel': (wide, 100),
        'output/bias': (100,),
    }
    assert shapes(built(network='stacked', hidden=hidden)) == {
        'lower/kernel': (28, 4 * wide_stacked),
        'lower/recurrent_kernel': (wide_stacked, 4 * wide_stacked),
        'lower/bias': (4 * wide_stacked,),
        'between/kernel': (wide_stacked, wide_stacked),
        'between/bias': (wide_stacked,),
        'upper/kernel': (wide_stacked, 4 * wide_stacked),
        'upper/recurrent_kernel': (wide_stacked, 4 * wide_stacked),
        'upper/bias': (4 * wide_stacked,),
        'narrow/kernel': (wide_stacked, narrow),
        'narrow/bias': (narrow,),
        'output/kernel': (narrow, 100),
        'output/bias': (100,),
    }


@each_preset
@pytest.mark.parametrize('network', models.WIDTHS)
def test_outputs_of_the_networks(network, preset):
    graph, state = nnx.split(built(network=network, preset=preset))
    letters = jax.ShapeDtypeStruct((19, 32), jnp.int32)
    outputs = jax.eval_shape(lambda state, letters: nnx.merge(graph, state)(letters), state, letters)
    assert (outputs.shape, outputs.dtype) == ((32, 100), jnp.float32)


def test_the_key_decides_the_weights():
    options = config.Model(network='stacked', hidden=4)
    first, again, other = (
        tree.named_leaves(
            nnx.to_pure_dict(
                nnx.state(models.build(options, letters=5, vector_size=3, key=jax.random.key(seed)))
            )
        )
        for seed in (0, 0, 1)
    )
    for name in (name for name in first if name.endswith('kernel')):
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
    drawn = [first[name].tobytes() for name in first if name.endswith('kernel')]
    assert len(set(drawn)) == len(drawn)  # no two kernels are drawn alike


# flax itself: gates by flax's name, in the order of our columns
FLAX_GATES = {'LSTM': 'ifgo', 'GRU': 'zrn'}
FLAX_CELLS = {'LSTM': flax.linen.LSTMCell, 'GRU': flax.linen.GRUCell}


def flax_parameters(layer: str, params: dict[str, np.ndarray]) -> dict:
    """Our weights as flax names them. Its LSTM keeps the biases with the recurrent kernels, its GRU with
    the others, but for the candidate's second one."""
    gates = FLAX_GATES[layer]
    kernels, recurrent, biases = (
        np.split(params[name], len(gates), axis=-1) for name in ('kernel', 'recurrent_kernel', 'bias')
    )
    made = {}
    for gate, kernel, recurrent_kernel, bias in zip(gates, kernels, recurrent, biases, strict=True):
        made[f'i{gate}'], made[f'h{gate}'] = {'kernel': kernel}, {'kernel': recurrent_kernel}
        made[f'h{gate}' if layer == 'LSTM' else f'i{gate}']['bias'] = bias
    if layer == 'GRU':
        made['hn']['bias'] = params['recurrent_bias']
    return {'params': made}


@each_layer
def test_flax_preset_computes_what_flax_does(layer):
    make, _ = LAYERS[layer]
    ours = make(5, 8, preset=FLAX, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(ours)
    params = nnx.to_pure_dict(state)
    params = {
        name: np.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), np.float32)
        for name, leaf in params.items()
    }
    nnx.replace_by_pure_dict(state, params)
    xs = rng.normal(size=(7, 4, 5)).astype(np.float32)
    found = nnx.merge(graph, state)(jnp.asarray(xs), time_major=True)

    cell = FLAX_CELLS[layer](8)
    carry = cell.initialize_carry(jax.random.key(0), xs[0].shape)
    variables = flax_parameters(layer, params)
    assert jax.tree.structure(variables) == jax.tree.structure(cell.init(jax.random.key(0), carry, xs[0]))
    for x, h in zip(xs, found, strict=True):
        carry, expected = cell.apply(variables, carry, x)
        assert_close(h, expected, 'float32 forward')


@each_layer
def test_flax_preset_starts_as_flax_does(layer):
    """flax's own initial weights have the properties that the tests above ask of ours."""
    cell = FLAX_CELLS[layer](256)
    xs = jnp.zeros((1, 28))
    variables = cell.init(jax.random.key(0), cell.initialize_carry(jax.random.key(0), xs.shape), xs)['params']
    for gate in FLAX_GATES[layer]:
        recurrent = np.asarray(variables[f'h{gate}']['kernel'], np.float64)
        assert_close(recurrent.T @ recurrent, np.eye(256), 'float32 orthogonal')
        assert_close(np.std(variables[f'i{gate}']['kernel']), 0.189, 'statistic')
    assert not any(np.any(leaf['bias']) for leaf in variables.values() if 'bias' in leaf)
